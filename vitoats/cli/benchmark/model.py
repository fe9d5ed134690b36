"""Times whole models of any size in ONNX Runtime: dense, int8, and OATS with the native operator.

    python tools/benchmark.py model
    python tools/benchmark.py model --model vit_base_patch16_224 --batch 1 --threads 1 --compression 0.6

Speed depends on shapes and on the sparsity pattern, not on the values of the weights. Therefore OATS runs only a few steps on
noise images, and random weights are used if a model's weights are unavailable, which the output reports. int8 is ONNX Runtime's
dynamic per-channel quantization of all MatMuls. If the package openvino is installed, OpenVINO is measured on the dense file.
"""

import argparse
import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags
from vitoats.common.machine import processor

if TYPE_CHECKING:
    from vitoats.benchmark.model import Variant
    from vitoats.loading.loaded import LoadedModel
    from vitoats.methods.oats import OATSConfig

MODELS = ("dinov2_vits14", "vit_base_patch16_224")
BATCHES = (1, 8)
THREADS = (1, 2)
COMPRESSIONS = (0.5, 0.6)
STEPS = 2  # of OATS: more steps would change which weights are zero, not how many
N_IMAGES = 4  # noise images for OATS


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    args = config_file.parse(_parser(), argv)

    from vitoats.methods.oats import OATSConfig

    configs = [
        OATSConfig(compression=compression, rank_ratio=args.rank_ratio, iterations=STEPS, seed=args.seed)
        for compression in args.compression or COMPRESSIONS
    ]
    rows = [row for name in args.model or MODELS for row in measure(name, args, configs)]
    _print(f"{processor()}; rank ratio {args.rank_ratio:g}; RSS is that of a process that runs the file", rows)
    print("; ".join(sorted({f"{row['model']}: {row['weights']}" for row in rows})))
    return {"processor": processor(), "rank_ratio": args.rank_ratio, "rows": rows}


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser("benchmark model", "whole models: dense, int8, OATS")
    several: dict[str, Any] = {"action": "append", "metavar": "X"}
    parser.add_argument("--model", **several, help=f"as for compress; {' and '.join(MODELS)}")
    parser.add_argument("--batch", type=flags.positive, **several, help="images at a time; 1 and 8")
    parser.add_argument("--threads", type=flags.positive, **several, help="CPU threads; 1 and 2")
    parser.add_argument("--compression", type=float, **several, help="shares of the weights to remove; 0.5 and 0.6")
    parser.add_argument("--rank-ratio", type=float, default=0.25, metavar="KAPPA", help="share of the kept for low rank")
    parser.add_argument("--img-size", type=flags.positive, metavar="PX", help="image size; the model's usual one by default")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a .pth or .safetensors file with the weights")
    parser.add_argument("--random-weights", action="store_true", help="random weights; nothing is fetched")
    parser.add_argument("--seed", type=flags.seed, default=0, help="of noise and solver")
    return parser


def measure(name: str, args: argparse.Namespace, configs: "list[OATSConfig]") -> list[dict[str, Any]]:
    """Measures one model; returns its rows of the JSON line."""
    from vitoats.benchmark.model import compare_variants
    from vitoats.benchmark.weights import load_or_randomise

    def say(_done: int, _total: int, what: str) -> None:
        common.log.info("measuring %s: %s", name, what)

    loaded, weights = load_or_randomise(name, args.checkpoint, args.random_weights, args.img_size)
    with tempfile.TemporaryDirectory(prefix="vitoats-benchmark-") as scratch:
        variants = write_variants(loaded, configs, args.seed, Path(scratch))
        size, batches, threads = loaded.preprocessing.img_size, args.batch or BATCHES, args.threads or THREADS
        times = compare_variants(variants, size, batches, threads, args.seed, say)
    return [{"model": name, "weights": weights, **dataclasses.asdict(row)} for row in times]


def write_variants(loaded: "LoadedModel", configs: "list[OATSConfig]", seed: int, folder: Path) -> "list[Variant]":
    """Exports the model dense, quantized, and compressed by OATS in all forms; the dense variant comes first."""
    from vitoats.benchmark.model import compressed_variants, dense_variants, openvino_variants
    from vitoats.compression.pipeline import compress
    from vitoats.compression.plan import plan_compression
    from vitoats.compression.settings import make_job
    from vitoats.models.adapter import adapt

    common.log.info("exporting %s", loaded.name)
    dense, int8 = dense_variants(loaded, folder)
    variants = [dense, int8]
    noise = loaded.inputs.noise(N_IMAGES, seed)
    job = make_job(loaded.name, "noise", method="oats")
    for config in configs:
        percent = 100 * config.total_compression()
        common.log.info("compressing by %g %%", percent)
        small = copy.deepcopy(loaded)
        adapter = adapt(small.timm_model, loaded.inputs)
        compress(plan_compression(adapter, dataclasses.replace(job, config=config), len(noise)), iter([noise]))
        folded = config is configs[0]  # the speed of a dense matrix does not depend on the compression
        variants += compressed_variants(small, f"oats-{percent:g}", folder, folded)
    return variants + openvino_variants(dense, int8)


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    from vitoats.report.tables import print_table

    print_table(
        title,
        ("model", "px", "batch", "threads", "variant", "ms", "speedup", "file MB", "RSS MB"),
        [
            (
                row["model"],
                f"{row['img_size']}",
                f"{row['batch']}",
                f"{row['threads']}",
                row["variant"],
                f"{row['ms']:.1f}",
                f"{row['speedup']:.2f}x",
                f"{row['file_mb']:.1f}",
                "" if row["rss_mb"] is None else f"{row['rss_mb']:.0f}",
            )
            for row in rows
        ],
    )
