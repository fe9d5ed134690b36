"""Compares compression methods: same calibration images, same test images, same budgets, one row a run.

    python tools/compare.py --model dinov2s_derived --methods magnitude,wanda,sparsegpt,oats --compressions 0.4,0.5,0.6 \
        --data-dir /usr/share/datasets/fashion-mnist --options oats:rank_ratio=0.25 --output runs/compare
    python tools/compare.py --model dinov2s_derived --methods wanda,oats --patterns 2:4 --nsamples 64 --output runs/small

The same command again goes on where it stopped. docs/compare.md says what each column is.
"""

import json
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitoats.cli import common, config_file, flags
from vitoats.cli import compress as compress_command
from vitoats.common.errors import InputError, RunError
from vitoats.comparison.plan import OWN, Run, compressions, methods, patterns, plan

if TYPE_CHECKING:
    from torch import Tensor

    from vitoats.data.images import ImageDataset
    from vitoats.evaluation.fidelity import LogitsAndFeatures
    from vitoats.loading.load import LoadedModel

Row = tuple[dict[str, Any], dict[str, np.ndarray]]  # figures, figures of each image

OOD_CROPS = 5  # random crops of each out-of-domain image, beside the model's own view
LAYER_IMAGES = 64  # test images that measure single layers


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, makes all rows that are missing, writes tables and plots; returns the JSON line."""
    args = config_file.parse(make_parser(), argv)
    start = time.perf_counter()
    common.set_threads(args.threads)
    common.check_device(args.device)
    runs, skipped = plan(args)
    for line in skipped:
        common.log.warning("%s", line)

    from vitoats.evaluation.store import RowStore

    bench = open_bench(args)
    store = RowStore(args.output, bench.settings)
    jobs: list[tuple[str, str, dict[str, Any], Callable[[], Row]]] = [
        ("dense", "dense", {}, partial(dense_row, bench, args.output)),
        ("int8", "int8", {}, partial(int8_row, bench, args.output)),
        *((run.name, str(run), run.settings, partial(compressed_row, bench, run, args)) for run in runs),
    ]
    finished = {name: store.load(name, settings) for name, _, settings, _ in jobs}  # what does not fit shows before the work
    rows: list[Row] = []
    failed: list[str] = []
    for i, (name, words, settings, make) in enumerate(jobs, 1):
        row = finished[name]
        common.log.info("[%d/%d] %s%s", i, len(jobs), words, " is done already" if row else "")
        try:
            if row is None:
                row = make()
                store.save(name, settings, *row)
            rows.append(row)
        except (InputError, RunError) as error:
            if not rows:  # nothing to compare with
                raise
            common.log.error("%s failed: %s", words, error)
            failed.append(words)
        bench.reference = rows[0]
    result = write_report(args, bench, rows, skipped, failed, start)
    if failed:
        raise RunError(f"failed: {', '.join(failed)}; the other rows are in {args.output}, and the same command tries again")
    return result


# ---- the bench: one dense model and the same images for all


@dataclass
class Bench:
    """What all rows share.

    Attributes:
        dense: the model before compression.
        device: where torch models run.
        threads: for ONNX Runtime; 0 takes all cores.
        images: opens the test images, batches of ([b, 3, h, w], labels [b]), in the same order each time.
        few_images: opens the first of them, without labels.
        n_images: how many there are, unreadable files included.
        n_classes: how many classes their labels come from.
        ood: opens the out-of-domain images, batches of ([b, crops, 3, h, w], labels); None where there are none.
        settings: all that makes rows comparable.
        quiet: no progress.
        reference: the dense model's row; its features are what others are compared with.
    """

    dense: "LoadedModel"
    device: str
    threads: int
    images: "Callable[[], Iterator[tuple[Tensor, Tensor]]]"
    few_images: "Callable[[], Iterator[Tensor]]"
    n_images: int
    n_classes: int
    ood: "Callable[[], Iterator[tuple[Tensor, Tensor]]] | None"
    settings: dict[str, Any]
    quiet: bool
    reference: Row | None = None


def open_bench(args: Namespace) -> Bench:
    """Loads the dense model and opens all images."""
    import torch

    import vitoats
    from vitoats.compression.resume import fingerprint
    from vitoats.data.crops import Crops
    from vitoats.data.images import SAMPLE, batches, digest, open_images
    from vitoats.evaluation.fidelity import logits_and_features
    from vitoats.loading.names import EMBEDDED

    if args.data_dir is None:
        if args.model != EMBEDDED:
            raise InputError("there are no images: give --data-dir a folder with train and val, each one folder a class")
        args.data_dir = SAMPLE
    dense = common.load(args)
    logits_and_features(dense, args.device)  # a model without a classifier is refused before the work
    transform = dense.preprocessing.transform()
    calibration, test = (open_images(args.data_dir, split, transform) for split in ("train", "test"))
    if not test.classes:
        raise InputError("these images have no labels: give --data-dir a folder with one subfolder for each class")
    if digest(calibration) == digest(test):
        common.log.warning("calibration and test images are drawn from the same ones: better give a folder with train and val")
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(test), generator=generator)[: args.num_samples].tolist()
    if len(order) < 2:
        raise InputError("one test image cannot tell methods apart: raise --num-samples, or add images")
    ood = None
    if args.ood_dir is not None:
        ood = open_images(str(args.ood_dir), "test", Crops(dense.preprocessing, OOD_CROPS, args.seed))
    settings = {
        "model": args.model,
        "weights (sha256)": fingerprint(dense.model, {}),
        "preprocessing": dense.preprocessing.to_dict(),
        "calibration images": _described(calibration),
        "test images": _described(test),
        "out-of-domain images": None if ood is None else _described(ood),
        "nsamples": args.nsamples,
        "num_samples": len(order),
        "seed": args.seed,
        "versions": {"vitoats": vitoats.__version__, "torch": torch.__version__},
    }
    return Bench(
        dense=dense,
        device=args.device,
        threads=args.threads,
        images=lambda: batches(test, order, args.batch_size, args.workers),
        few_images=lambda: (images for images, _ in batches(test, order[:LAYER_IMAGES], args.batch_size, 0)),
        n_images=len(order),
        n_classes=len(test.classes),
        ood=None if ood is None else lambda: batches(ood, list(range(len(ood))), max(1, args.batch_size // 8), args.workers),
        settings=settings,
        quiet=args.quiet,
    )


def _described(dataset: "ImageDataset") -> str:
    from vitoats.data.images import digest

    return f"{len(dataset)} ({digest(dataset)[:12]})"


# ---- rows


def figures(bench: Bench, forward: "LogitsAndFeatures", name: str) -> Row:
    """What the test images say of a model, beside the dense one; of the dense one itself where there is no reference yet."""
    from vitoats.evaluation import fidelity
    from vitoats.evaluation.paired import binomial_se, paired_difference

    with common.Bar(f"evaluating {name}", bench.quiet) as bar:
        found = fidelity.outcome(forward, bench.images(), bench.n_classes, lambda done: bar.update(done, bench.n_images))
    if not np.isfinite(found.features).all():
        raise RunError(f"the features of {name} are not finite (NaN or Inf)")
    ood = None if bench.ood is None else fidelity.stacked_features(forward, bench.ood())
    arrays = {"features": found.features} | ({} if ood is None else {"ood_features": ood})
    dense = bench.reference[1] if bench.reference else {**arrays, "hits1": found.hits1}
    if len(dense["hits1"]) != len(found.hits1):
        raise RunError(f"{len(found.hits1)} test images could be read, not the {len(dense['hits1'])} of the dense model")
    difference, difference_se = paired_difference(100 * found.hits1.astype(float), 100 * dense["hits1"].astype(float))
    cosine = fidelity.cosines(found.features, dense["features"])
    row = {
        "n_images": len(found.hits1),
        "top1": 100 * float(found.hits1.mean()),
        "top1_se": binomial_se(found.hits1),
        "vs_dense": difference,
        "vs_dense_se": difference_se,
        "top5": 100 * float(found.hits5.mean()),
        "cosine": float(cosine.mean()),
        "relative_error": fidelity.relative_error(found.features, dense["features"]),
        "ood_cosine": None if ood is None else float(fidelity.cosines(ood, dense["ood_features"]).mean()),
        "ood_relative_error": None if ood is None else fidelity.relative_error(ood, dense["ood_features"]),
    }
    kept = {} if bench.reference else arrays  # only the dense model's features are needed again
    return row, {"hits1": found.hits1, "hits5": found.hits5, "cosine": cosine, **kept}


def dense_row(bench: Bench, output: Path) -> Row:
    """The model before compression."""
    from vitoats.evaluation.fidelity import logits_and_features
    from vitoats.loading.checkpoint import save_checkpoint
    from vitoats.models.flops import count_flops

    row, arrays = figures(bench, logits_and_features(bench.dense, bench.device), "dense")
    folder = output / "models" / "dense"
    save_checkpoint(bench.dense, folder, {"method": "dense"}, overwrite=True)
    row |= {
        **described("dense"),
        "bytes": weight_bytes(folder),
        "flops": count_flops(bench.dense.model, bench.dense.inputs),
    }
    _remove(folder)
    return row, arrays


def int8_row(bench: Bench, output: Path) -> Row:
    """ONNX Runtime's dynamic quantization of the dense model, what one would deploy otherwise."""
    import onnx
    import torch

    from vitoats.export.int8 import classifier_input, quantize, with_output
    from vitoats.export.onnx_file import export_onnx
    from vitoats.runtime.inference import session

    assert bench.reference is not None
    folder = output / "models" / "int8"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        start = time.perf_counter()
        dense, int8, both = (folder / f"{name}.onnx" for name in ("dense", "int8", "both_outputs"))
        name = classifier_input(export_onnx(bench.dense, dense))
        quantize(dense, int8)
        seconds = time.perf_counter() - start
        onnx.save(with_output(onnx.load(str(int8)), name), str(both))
        opened = session(both, bench.threads)

        def forward(images: "Tensor") -> "tuple[Tensor, Tensor]":
            logits, features = opened.run(None, {opened.get_inputs()[0].name: images.numpy()})
            return torch.from_numpy(np.asarray(logits)), torch.from_numpy(np.asarray(features))

        row, arrays = figures(bench, forward, "int8")
        size = int8.stat().st_size
    finally:
        _remove(folder)
    return row | {**described("int8", seconds=seconds), "bytes": size, "flops": bench.reference[0]["flops"]}, arrays


def compressed_row(bench: Bench, run: Run, args: Namespace) -> Row:
    """Compresses as compress does, from the same flags, and measures what comes out."""
    from vitoats.evaluation.fidelity import layer_error, logits_and_features
    from vitoats.loading.checkpoint import save_checkpoint
    from vitoats.models.flops import count_flops

    folder = run.args.output = args.output / "models" / run.name
    try:
        loaded, about, report = compress_command.compress_model(run.args)
        row, arrays = figures(bench, logits_and_features(loaded, bench.device), run.name)
        save_checkpoint(loaded, folder, about, overwrite=True)
        row |= {
            **described(run.label, report.compression, about["config"].get("pattern"), report.seconds),
            "target": run.target,
            "asked_pattern": run.pattern,
            "layer_error": layer_error(bench.dense.timm_model, loaded.timm_model, bench.few_images()),
            "bytes": weight_bytes(folder),
            "flops": count_flops(loaded.model, loaded.inputs),
        }
    finally:
        if not args.keep_models:
            _remove(folder)
    return row, arrays


def described(
    method: str, compression: float = 0.0, pattern: str | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """The columns that the images have no part in."""
    return {
        "method": method,
        "compression": compression,
        "target": None,
        "pattern": pattern,
        "asked_pattern": None,
        "layer_error": None,
        "seconds": seconds,
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder that compress wrote: values, bit masks, U, V, all that stays dense, and the head."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _remove(folder: Path) -> None:
    """Removes a model's folder, and the folder of models with the last one."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


# ---- what comes out


def write_report(args: Namespace, bench: Bench, found: list[Row], skipped: list[str], failed: list[str], start: float) -> dict:
    """Writes the tables and plots; returns the JSON line."""
    from vitoats.report.comparison import COLUMNS, PAIR_COLUMNS, comparison_table, pairs, rounded, write_csv
    from vitoats.report.plots import plot_accuracy

    rows = [rounded(row) for row, _ in found]
    runs = [(row, arrays) for row, arrays in found if row["asked_pattern"] is not None]
    differences = pairs([row for row, _ in runs], [arrays for _, arrays in runs])
    title = f"{args.model}, {rows[0]['n_images']} test images"
    if not args.quiet:
        comparison_table(f"{title}; MB are those of the weights on disk; ± is one standard error", rows)
    write_csv(args.output / "rows.csv", COLUMNS, rows)
    write_csv(args.output / "pairs.csv", PAIR_COLUMNS, differences)
    for x in ("compression", "bytes"):
        plot_accuracy(args.output / f"accuracy_{x}", rows, x, title)
    result = {
        "model": args.model,
        "data_dir": args.data_dir,
        "n_images": rows[0]["n_images"],
        "nsamples": args.nsamples,
        "seed": args.seed,
        "rows": [{name: row[name] for name in COLUMNS} for row in rows],
        "pairs": differences,
        "skipped": skipped,
        "failed": failed,
        "output": str(args.output),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (args.output / "results.json").write_text(json.dumps({**result, "settings": bench.settings}, indent=1))
    return result


def make_parser() -> flags.ArgumentParser:
    """The flags of compare."""
    parser = flags.parser("compare", (__doc__ or "").split("\n")[0])
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, batch_size=64)
    flags.add_compute_flags(parser)
    parser.add_argument(
        "--methods", type=methods, required=True, metavar="A,B,...", help="METHOD or LABEL=METHOD, each as compress takes it"
    )
    parser.add_argument(
        "--compressions", type=compressions, default=[0.5], metavar="RHO,...", help="shares of weights to remove"
    )
    parser.add_argument(
        "--patterns",
        type=patterns,
        default=[OWN],
        metavar="P,...",
        help="own (each method's own default), row, layer, 1x4, 2:4",
    )
    parser.add_argument(
        "--options", action="append", metavar="METHOD:NAME=VALUE,...", help="settings of one method; may be given again"
    )
    parser.add_argument("--nsamples", type=flags.positive, default=512, metavar="N", help="calibration images, of train")
    parser.add_argument(
        "--num-samples", type=flags.positive, metavar="N", help="test images, the first of a seeded shuffle; all by default"
    )
    parser.add_argument("--ood-dir", type=Path, metavar="DIR", help="images of another kind: adds the ood columns")
    parser.add_argument("--keep-models", action="store_true", help="keep the compressed folders in DIR/models")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="the folder to write, or to go on with")
    return parser
