"""Times whole models in ONNX Runtime: dense, int8, and OATS with the native operator, from ViTs of any size.

    python tools/benchmark.py model
    python tools/benchmark.py model --model vit_base_patch16_224 --batch 1 --threads 1 --compression 0.6

Speed depends on shapes and on the pattern of zeros, not on what the weights are: OATS runs for a few steps on noise images, and
where a model's weights cannot be had, random ones do; the table says so. int8 is ONNX Runtime's dynamic quantization of all
MatMuls, per channel. OpenVINO is measured on the dense file where the package openvino is installed.
"""

import copy
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitoats.cli import common, config_file, flags

if TYPE_CHECKING:
    from vitoats.export.onnx_file import Form
    from vitoats.methods.oats import OATSConfig

MODELS = ("dinov2_vits14", "vit_base_patch16_224")
COMPRESSIONS = (0.5, 0.6)
STEPS = 2  # of OATS

RESIDENT = """
import json, sys
import numpy as np
from vitoats.runtime import session
opened = session(sys.argv[1], int(sys.argv[2]))
batch = np.zeros(json.loads(sys.argv[3]), np.float32)
for _ in range(3):
    opened.run(None, {opened.get_inputs()[0].name: batch})
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(int(status["VmRSS"].split()[0]) * 1024)
"""


@dataclass(frozen=True)
class Variant:
    """A file and what runs it: ONNX Runtime, or OpenVINO in a precision."""

    name: str
    file: Path
    openvino: str | None = None

    def open(self, threads: int, batch: np.ndarray) -> Callable[[], object]:
        """A call that runs the file on a batch [b, 3, h, w]."""
        if self.openvino is None:
            from vitoats.runtime.inference import inference, session

            return inference(session(self.file, threads), batch)
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": self.openvino, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        request = openvino.compile_model(str(self.file), "CPU", settings).create_infer_request()
        return lambda: request.infer([batch])


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
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
    parser.set_defaults(crop_mode=None)
    parser.add_argument("--seed", type=flags.seed, default=0, help="of noise and solver")
    args = config_file.parse(parser, argv)

    from vitoats.methods.oats import OATSConfig
    from vitoats.report.tables import print_table

    configs = [
        OATSConfig(compression=compression, rank_ratio=args.rank_ratio, iterations=STEPS, seed=args.seed)
        for compression in args.compression or COMPRESSIONS
    ]
    rows: list[dict[str, Any]] = []
    for name in args.model or MODELS:
        with tempfile.TemporaryDirectory(prefix="vitoats-benchmark-") as scratch:
            rows += measure(name, args, configs, Path(scratch))
    print_table(
        f"{common.processor()}; rank ratio {args.rank_ratio:g}; RSS is that of a process that runs the file",
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
    print("; ".join(sorted({f"{row['model']}: {row['weights']}" for row in rows})))
    return {"processor": common.processor(), "rank_ratio": args.rank_ratio, "rows": rows}


def measure(name: str, args, configs: list["OATSConfig"], scratch: Path) -> list[dict[str, Any]]:
    """Writes all variants of a model and measures them in turns, for each batch and number of threads."""
    from vitoats.runtime.inference import median_ms

    args.model = name
    loaded, weights = common.load_or_randomise(args)
    variants = write_variants(loaded, configs, args.seed, scratch)
    rows = []
    for threads, batch in itertools.product(args.threads or (1, 2), args.batch or (1, 8)):
        common.log.info("measuring %s: batch %d, %d threads", name, batch, threads)
        images = np.random.default_rng(args.seed).standard_normal(loaded.inputs.shape(batch), np.float32)
        times = median_ms([variant.open(threads, images) for variant in variants], turn_seconds=0.5)
        for variant, ms in zip(variants, times, strict=True):
            rows.append(
                {
                    "model": name,
                    "weights": weights,
                    "img_size": loaded.inputs.img_size,
                    "batch": batch,
                    "threads": threads,
                    "variant": variant.name,
                    "ms": round(ms, 3),
                    "speedup": round(times[0] / ms, 3),
                    "file_mb": round(variant.file.stat().st_size / 1e6, 2),
                    "rss_mb": resident_mb(variant, threads, images.shape) if variant.openvino is None else None,
                }
            )
    return rows


def write_variants(loaded, configs: list["OATSConfig"], seed: int, scratch: Path) -> list[Variant]:
    """Exports the model dense, quantized, and compressed in all forms; the dense one comes first."""

    from vitoats.compression.pipeline import compress
    from vitoats.export.int8 import quantize
    from vitoats.export.onnx_file import export_onnx

    noise = loaded.inputs.noise(4, seed)
    common.log.info("exporting %s", loaded.name)
    dense, int8 = scratch / "dense.onnx", scratch / "int8.onnx"
    export_onnx(loaded, dense)
    quantize(dense, int8)
    variants = [Variant("dense", dense), Variant("int8", int8)]
    for config in configs:
        label = f"oats-{100 * config.total_compression():g}"
        common.log.info("compressing by %g %%", 100 * config.total_compression())
        small = copy.deepcopy(loaded)
        compress(small.timm_model, iter([noise]), method="oats", config=config, inputs=loaded.inputs, nsamples=len(noise))
        forms: list[tuple[str, Form, bool]] = [("", "sparse", False), ("-float16", "sparse", True)]
        if config is configs[0]:  # a dense matrix does not care how much was removed
            forms.append(("-folded", "dense", False))
        for suffix, form, float16 in forms:
            variants.append(Variant(label + suffix, scratch / f"{label}{suffix}.onnx"))
            export_onnx(small, variants[-1].file, form, float16=float16)
    if importlib.util.find_spec("openvino"):
        variants += [Variant(f"openvino-{precision}", dense, precision) for precision in ("f32", "bf16")]
        variants.append(Variant("openvino-int8", int8, "f32"))
    return variants


def resident_mb(variant: Variant, threads: int, shape: tuple[int, ...]) -> float:
    """Resident memory, in MB, of a fresh process that has opened the file and run it three times."""
    argv = [sys.executable, "-c", RESIDENT, str(variant.file), str(threads), json.dumps(shape)]
    return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout) / 1e6
