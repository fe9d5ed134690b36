"""Benchmarks that compare alternatives side by side in one run.

python tools/benchmark.py op                                        one product, sparse against dense and int8
python tools/benchmark.py model --model vit_base_patch16_224        whole models in ONNX Runtime
python tools/benchmark.py decode --model smollm2                    language models, token by token
python tools/benchmark.py solver --model vit_base_patch16_224       the exact OATS solver against the fast one
python tools/benchmark.py files dense.onnx small.onnx               exported files against the first of them
python tools/benchmark.py profile small.onnx                        where the time of an exported file goes
python tools/benchmark.py layers                                    output errors of several methods on single matrices
python tools/benchmark.py busy                                      two processes at once against one alone
"""

import importlib
from typing import Any

from vitoats.cli import record
from vitoats.cli.config_file import first_look
from vitoats.common.errors import InputError

BENCHMARKS = ("op", "model", "decode", "solver", "files", "profile", "layers", "busy")  # one module of this package each


def main(argv: list[str]) -> dict[str, Any]:
    """Runs the named benchmark; returns the JSON line."""
    if not argv or argv[0] not in BENCHMARKS:
        if argv and argv[0] in ("-h", "--help"):
            print(__doc__)
            raise SystemExit(0)
        raise InputError(f"name a benchmark: {', '.join(BENCHMARKS)}")
    benchmark = importlib.import_module(f"vitoats.cli.benchmark.{argv[0]}")
    return record.recorded("benchmark", first_look(argv[1:], complain=False), argv, lambda _: benchmark.main(argv[1:]))
