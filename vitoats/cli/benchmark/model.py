"""Times whole models of any size in ONNX Runtime: dense, int8, and OATS with the native operator; and in OpenVINO if installed.

    python tools/benchmark.py model
    python tools/benchmark.py model --model vit_base_patch16_224 --batch 1 --threads 1 --compression 0.6

Speed depends on shapes and on the number of zeros, not on the values of the weights. Therefore OATS runs only a few steps on
noise images, and random weights are used if a model's weights are unavailable, which the output reports. With --random-weights
zeros and low-rank terms are random, too. All variants take turns in one run:

    dense, int8           the model as it is, and ONNX Runtime's dynamic quantization of all MatMuls, per channel
    native-int8           the dense model in int8, with the native operators
    oats-50               S + U V in the native operator, 50 % of the weights removed; -float16: stored in float16;
                          -int8: weights and products in int8; -folded: as dense matrices. A quarter of what is kept is
                          low-rank; nothing in int8, where that costs time (--rank-ratio: all forms alike)
    openvino-f32, -bf16   the dense file in OpenVINO (pip install 'vitoats[openvino]')
    openvino-int8         quantized by NNCF, with fixed scales for the activations; -int8-bf16: the rest in bfloat16
"""

import argparse
import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitoats.cli import common, config_file, flags
from vitoats.common.amx import refuse_amx
from vitoats.common.errors import InputError
from vitoats.common.machine import processor
from vitoats.common.sizes import in_words

if TYPE_CHECKING:
    from vitoats.benchmark.model import Variant
    from vitoats.loading.loaded import LoadedModel
    from vitoats.methods.oats import OATSConfig

MODELS = ("dinov2_vits14", "vit_base_patch16_224")
BATCHES = (1, 8)
THREADS = (1, 2)
COMPRESSIONS = (0.5, 0.6)
RANK_RATIO, INT8_RANK_RATIO = 0.25, 0.0
STEPS = 2  # of OATS: more steps would change which weights are zero, not how many
N_IMAGES = 4  # noise images for OATS


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    args = config_file.parse(_parser(), argv)
    if args.no_amx:
        refuse_amx()

    from vitoats.methods.oats import OATSConfig
    from vitoats.runtime import library

    rank_ratio, of_int8 = (RANK_RATIO, INT8_RANK_RATIO) if args.rank_ratio is None else (args.rank_ratio,) * 2
    configs = [
        OATSConfig(compression=compression, rank_ratio=rank_ratio, iterations=STEPS, seed=args.seed)
        for compression in args.compression or COMPRESSIONS
    ]
    check_names(args.variant or [], configs)
    rows = [row for name in args.model or MODELS for row in measure(name, args, configs, of_int8)]
    kernels = library.isa() if library.library_path() else None
    machine = f"{processor()}, kernels for {kernels or 'nothing: the native library is missing'}"
    ratios = f"rank ratio {rank_ratio:g}, {of_int8:g} in int8"
    _print(f"{machine}; {ratios}; RSS is that of a process that runs the file", rows)
    print("; ".join(sorted({f"{row['model']}: {row['weights']}" for row in rows})))
    return {"processor": processor(), "isa": kernels, "rank_ratio": rank_ratio, "rank_ratio_int8": of_int8, "rows": rows}


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser("benchmark model", __doc__)
    several: dict[str, Any] = {"action": "append", "metavar": "X"}
    parser.add_argument("--model", **several, help=f"as for compress; {' and '.join(MODELS)}")
    parser.add_argument("--batch", type=flags.positive, **several, help="images at a time; 1 and 8")
    parser.add_argument("--threads", type=flags.positive, **several, help="CPU threads; 1 and 2")
    parser.add_argument("--compression", type=float, **several, help="shares of the weights to remove; 0.5 and 0.6")
    parser.add_argument(
        "--rank-ratio",
        type=float,
        metavar="KAPPA",
        help=f"share of the kept for low rank; by default {RANK_RATIO:g}, and {INT8_RANK_RATIO:g} in int8",
    )
    parser.add_argument("--variant", metavar="NAME", action="append", help="only this beside dense and int8; all by default")
    flags.add_img_size(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a .pth or .safetensors file with the weights")
    parser.add_argument("--random-weights", action="store_true", help="random weights; nothing is fetched")
    parser.add_argument("--seed", type=flags.seed, default=0, help="of noise and solver")
    flags.add_no_amx(parser)
    return parser


def check_names(names: list[str], configs: "list[OATSConfig]") -> None:
    """Checks the names given as --variant before anything is exported.

    Raises:
        InputError: there is no such variant.
    """
    from vitoats.benchmark.openvino_files import installed

    known = ["dense", "int8", "native-int8"]
    for config in configs:
        oats = label(config)
        known += [oats, f"{oats}-float16", f"{oats}-int8", *([f"{oats}-folded"] if config is configs[0] else [])]
    for name in names:
        if name.startswith("openvino-") and not installed("openvino"):
            raise InputError(f"{name} needs the package openvino: pip install 'vitoats[openvino]', or leave --variant out")
        if name not in known and not name.startswith("openvino-"):
            raise InputError(f"there is no variant {name}: give --variant one of {', '.join(known)}, or one of openvino-")


def label(config: "OATSConfig") -> str:
    """The name of the variants of a compression: oats-50."""
    return f"oats-{100 * config.total_compression():g}"


def measure(name: str, args: argparse.Namespace, configs: "list[OATSConfig]", of_int8: float) -> list[dict[str, Any]]:
    """Measures one model, with the rank ratio ``of_int8`` in int8; returns its rows of the JSON line."""
    from vitoats.benchmark.model import compare_variants
    from vitoats.benchmark.weights import load_or_randomise

    def say(_done: int, _total: int, what: str) -> None:
        common.log.info("measuring %s: %s", name, what)

    loaded, weights = load_or_randomise(common.source(args, name))
    with tempfile.TemporaryDirectory(prefix="vitoats-benchmark-") as scratch:
        variants = chosen(write_variants(loaded, configs, of_int8, args, Path(scratch)), args.variant)
        batches, threads = args.batch or BATCHES, args.threads or THREADS
        times = compare_variants(variants, loaded.inputs, batches, threads, args.seed, say)
    return [{"model": name, "weights": weights, **dataclasses.asdict(row)} for row in times]


def write_variants(
    loaded: "LoadedModel", configs: "list[OATSConfig]", of_int8: float, args: argparse.Namespace, folder: Path
) -> "list[Variant]":
    """Exports the model dense, quantized, and compressed by OATS in all forms; the dense variant comes first."""
    from vitoats.benchmark.model import compressed_variants, dense_variants, openvino_variants

    common.log.info("exporting %s", loaded.name)
    variants = dense_variants(loaded, folder)
    dense = variants[0]
    for config in configs:
        if args.variant and not any(f"{name}-".startswith(f"{label(config)}-") for name in args.variant):
            continue
        common.log.info("compressing by %g %%", 100 * config.total_compression())
        folded = config is configs[0]  # the speed of a dense matrix does not depend on the compression
        small = compressed(loaded, config, args)
        other = dataclasses.replace(config, rank_ratio=of_int8)
        for_int8 = small if other == config else compressed(loaded, other, args)
        variants += compressed_variants(small, for_int8, label(config), folder, folded)
    return variants + openvino_variants(loaded, dense, args.seed, folder)


def compressed(loaded: "LoadedModel", config: "OATSConfig", args: argparse.Namespace) -> "LoadedModel":
    """A copy of the model, compressed at random with --random-weights, otherwise by a few steps of OATS on noise images."""
    from vitoats.benchmark.random_layers import of_budget, with_random_layers
    from vitoats.compression.pipeline import compress
    from vitoats.compression.plan import plan_compression
    from vitoats.compression.settings import make_job
    from vitoats.models.adapter import adapt

    if args.random_weights:
        return with_random_layers(loaded, of_budget(config), "row", np.random.default_rng(args.seed))
    small, noise = copy.deepcopy(loaded), loaded.inputs.noise(N_IMAGES, args.seed)
    job = dataclasses.replace(make_job(loaded.name, "noise", method="oats"), config=config)
    plan = plan_compression(adapt(small.timm_model, small.inputs), job, len(noise)).with_budgets(config, None)
    compress(plan, iter([noise]))
    return small


def chosen(variants: "list[Variant]", names: list[str] | None) -> "list[Variant]":
    """The variants with these names, and the two that all are compared with; all if no name is given.

    Raises:
        InputError: there is no such variant.
    """
    from vitoats.benchmark.model import DENSE, INT8

    known = [variant.name for variant in variants]
    for name in names or []:
        if name not in known:
            raise InputError(f"there is no variant {name}: give --variant one of {', '.join(known)}")
    return [variant for variant in variants if names is None or variant.name in (DENSE, INT8, *names)]


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    from vitoats.report.tables import print_table

    print_table(
        title,
        ("model", "px", "batch", "threads", "variant", "ms", "speedup", "over int8", "file MB", "RSS MB"),
        [
            (
                row["model"],
                in_words(row["img_size"]),
                f"{row['batch']}",
                f"{row['threads']}",
                row["variant"],
                f"{row['ms']:.1f}",
                f"{row['speedup']:.2f}x",
                f"{row['speedup_int8']:.2f}x",
                f"{row['file_mb']:.1f}",
                f"{row['rss_mb']:.0f}",
            )
            for row in rows
        ],
    )
