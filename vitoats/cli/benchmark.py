"""Measures, side by side in one run.

python tools/benchmark.py op                                        one product, sparse against dense and int8
python tools/benchmark.py model --model vit_base_patch16_224        whole models in ONNX Runtime
python tools/benchmark.py solver --model vit_base_patch16_224       the exact OATS solver against the fast one
python tools/benchmark.py files dense.onnx small.onnx               files that were exported, against the first
python tools/benchmark.py layers                                    what single matrices lose by several methods
"""

from typing import Any

from vitoats.cli import benchmark_files, benchmark_layers, benchmark_model, benchmark_op, benchmark_solver
from vitoats.common.errors import InputError

BENCHMARKS = {
    "op": benchmark_op.main,
    "model": benchmark_model.main,
    "solver": benchmark_solver.main,
    "files": benchmark_files.main,
    "layers": benchmark_layers.main,
}


def main(argv: list[str]) -> dict[str, Any]:
    """Picks the benchmark; returns the JSON line."""
    if not argv or argv[0] not in BENCHMARKS:
        if argv and argv[0] in ("-h", "--help"):
            print(__doc__)
            raise SystemExit(0)
        raise InputError(f"name a benchmark: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[argv[0]](argv[1:])
