"""Trains linear heads on a frozen backbone's features, like DINOv2's linear evaluation, and keeps the best one.

    python tools/train_linear_probe.py --model dinov2_vits14 --data-dir imagenet --nsamples 100000 --output head.safetensors
    python tools/train_linear_probe.py --model dinov2s_derived --data-dir /usr/share/datasets/fashion-mnist -o head.safetensors

Trains heads for 1 and 4 layers, with and without the mean of the patch tokens, and for many learning rates. The head that is
best on held-out training images is trained again on all training images. Test images are used only to measure its accuracy.
Features are computed once (--cache keeps them). --model may be a file that export_onnx --features all or layers=4 wrote.
"""

import time
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags, record
from vitoats.common.errors import InputError
from vitoats.common.files import atomic_write

if TYPE_CHECKING:
    from vitoats.evaluation.features import Features
    from vitoats.evaluation.frozen import Frozen


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, trains, writes the head file; returns the JSON line."""
    return record.recorded("train_linear_probe", config_file.parse(make_parser(), argv), argv, execute)


def execute(args: Namespace) -> dict[str, Any]:
    """Trains, writes the head file; returns the JSON line."""
    if args.data_dir is None:
        raise InputError("there are no images to train on: give --data-dir a folder with one subfolder for each class")
    from vitoats.common.outputs import check_output_file

    if args.output.suffix != ".safetensors":
        raise InputError(f"{args.output} does not end in .safetensors: give --output a file such as head.safetensors")
    check_output_file(args.output, args.overwrite)

    import torch

    from vitoats.common.devices import set_threads
    from vitoats.common.noted import note
    from vitoats.data.images import digest
    from vitoats.evaluation.features import MOST_LAYERS
    from vitoats.evaluation.knn import knn_predict
    from vitoats.evaluation.probe import LEARNING_RATES, Schedule, accuracy, pick, train_again, try_heads
    from vitoats.loading.head_files import save_head
    from vitoats.models.heads import HeadInfo

    if args.solver == "lbfgs" and args.learning_rates:
        raise InputError("--learning-rates are those of sgd: leave them out, or --solver lbfgs")
    if args.head_layers not in (None, 1, MOST_LAYERS):
        raise InputError(f"heads are trained for 1 or {MOST_LAYERS} layers: give --head-layers 1 or {MOST_LAYERS}")
    set_threads(args.threads)
    start = time.perf_counter()
    frozen = open_frozen(args)
    depth = frozen.depth
    if depth == 0:
        common.log.info("%s has no class token: the head takes its pooled features", args.model)
    layers = [args.head_layers] if args.head_layers else [n for n in (1, MOST_LAYERS) if n <= depth] or [0]
    if layers[0] > depth:
        raise InputError(f"{args.model} gives class tokens of {depth} layers: leave --head-layers out")
    rates = tuple(args.learning_rates or LEARNING_RATES)
    schedule = None if args.solver == "lbfgs" else Schedule(rates, args.epochs, args.train_batch_size, args.seed)

    training = drawn_images(frozen, args, "train", args.nsamples)
    classes = training.dataset.classes
    testing = drawn_images(frozen, args, "test", args.test_samples, classes)
    note(lambda: {f"{images.split} images": digest(images.dataset, images.order) for images in (training, testing)})
    if training.paths & testing.paths:
        common.log.warning("%s has no test images of its own: the accuracy is that on training images", args.data_dir)
    if not 0 < round(args.held_out * len(training.order)) < len(training.order):
        n = len(training.order)
        raise InputError(f"{n} images cannot be split to train and to pick the best: give more, or another --held-out")

    features, test = features_of(frozen, args, training), features_of(frozen, args, testing)
    order = torch.randperm(len(features.labels), generator=torch.Generator().manual_seed(args.seed))
    n_held_out = round(args.held_out * len(order))
    train, held_out = features.rows(order[n_held_out:]), features.rows(order[:n_held_out])
    with common.Bar("training", args.quiet) as bar:
        candidates = try_heads(train, held_out, len(classes), layers, schedule, bar.update)
    best = pick(candidates)
    weight, bias = train_again(best, features, len(classes), schedule)

    top1 = accuracy(test.select(best.layers, best.patch_mean) @ weight.T + bias, test.labels)
    plain = (1, False) if depth else (0, True)  # the last class token, or the pooled features
    nearest = knn_predict(features.select(*plain), features.labels, test.select(*plain), args.knn)
    img_size = frozen.preprocessing.img_size
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as partial:
        save_head(partial, weight, bias, HeadInfo(frozen.source, img_size, best.layers, classes, best.patch_mean))
    if not args.quiet:
        print_candidates(candidates)
    return {
        "model": args.model,
        "head": str(args.output),
        "layers": best.layers,
        "patch_mean": best.patch_mean,
        "learning_rate": best.learning_rate,
        "top1": round(top1, 4),
        "top1_held_out": round(best.top1, 4),
        "top1_knn": round(100 * int((nearest == test.labels).sum()) / len(test.labels), 4),
        "n_heads": len(candidates),
        "n_train": len(features.labels),
        "n_held_out": n_held_out,
        "n_images": len(test.labels),
        "img_size": img_size,
        "seconds": round(time.perf_counter() - start, 1),
    }


def open_frozen(args: Namespace) -> "Frozen":
    """The backbone of --model: an ONNX file in ONNX Runtime, anything else in torch."""
    from vitoats.common.devices import check_device
    from vitoats.evaluation.frozen import frozen_file, frozen_model

    for flag in ("head", "head_name"):
        if getattr(args, flag):
            raise InputError(f"a head is trained here: leave --{flag.replace('_', '-')} out")
    if not args.model.endswith(".onnx"):
        return frozen_model(common.load(args, with_head=False), check_device(args.device))
    common.refuse_for_files(args)
    frozen = frozen_file(args.model, args.threads, args.img_size)
    settings = {key: getattr(args, key) for key in ("mean", "std", "interpolation", "crop_pct")}
    return replace(frozen, preprocessing=frozen.preprocessing.changed(args.crop_mode, settings))


@dataclass(frozen=True)
class DrawnImages:
    """Images of a split.

    Attributes:
        split: "train" or "test".
        dataset: all images of the split.
        order: indices of those that are used.
        paths: their files; empty for images in memory.
    """

    split: str
    dataset: Any
    order: list[int]
    paths: set[str]


def drawn_images(
    frozen: "Frozen", args: Namespace, split: str, wanted: int | None, classes: tuple[str, ...] = ()
) -> DrawnImages:
    """The images of a split, or ``wanted`` randomly drawn ones; with labels of ``classes``, if these are given.

    Raises:
        InputError: there are no labels, or other ones than those of ``classes``.
    """
    import torch

    from vitoats.data.images import open_images
    from vitoats.data.labelled import Renumbered

    dataset: Any = open_images(args.data_dir, split, frozen.preprocessing.transform())
    if not dataset.classes:
        raise InputError("these images have no labels: training needs a folder with one subfolder for each class")
    if classes and dataset.classes != classes:
        if unknown := [name for name in dataset.classes if name not in classes]:
            raise InputError(f"{args.data_dir} has test images of {unknown[0]!r}, but none to train on: add or remove some")
        common.log.warning("there are test images of %d of %d classes", len(dataset.classes), len(classes))
        dataset = Renumbered(dataset, [classes.index(name) for name in dataset.classes], classes)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))[:wanted].tolist()
    return DrawnImages(split, dataset, order, {dataset.paths[i] for i in order} if getattr(dataset, "paths", []) else set())


def features_of(frozen: "Frozen", args: Namespace, images: DrawnImages) -> "Features":
    """The features of images, computed or read from the cache."""
    from vitoats.common.fingerprint import json_sha256
    from vitoats.data.images import batches, digest
    from vitoats.evaluation.features import PIECE, cached, extract

    place = {index: i for i, index in enumerate(images.order)}

    def compute(order: list[int]) -> "Features":
        stream = batches(images.dataset, order, args.batch_size, args.workers)
        return extract(frozen.tokens, stream, lambda done: bar.update(place[order[0]] + done, len(images.order)))

    with common.Bar(f"features ({images.split})", args.quiet) as bar:
        if args.cache is None:
            try:
                return compute(images.order)
            except KeyboardInterrupt:
                common.log.warning("no features are kept without --cache DIR: the same command starts anew")
                raise
        about = {"preprocessing": frozen.preprocessing.to_dict(), "images": digest(images.dataset, images.order)}
        key = json_sha256([about, frozen.digest()])
        return cached(args.cache, key, images.order, compute, PIECE * args.batch_size)


def print_candidates(candidates: list[Any]) -> None:
    """Prints the best head for each choice of features on stdout."""
    from vitoats.evaluation.probe import pick
    from vitoats.report.tables import print_table

    kinds = sorted({(c.layers, c.patch_mean) for c in candidates})
    best = [pick([c for c in candidates if (c.layers, c.patch_mean) == kind]) for kind in kinds]
    print_table(
        f"{len(candidates)} heads, the best of each kind on held-out training images",
        ("layers", "patch mean", "learning rate", "top-1 %", "loss"),
        [
            (f"{c.layers}", "yes" if c.patch_mean else "no", f"{c.learning_rate or '-'}", f"{c.top1:.2f}", f"{c.loss:.4f}")
            for c in best
        ],
    )


def make_parser() -> flags.ArgumentParser:
    """The flags of train_linear_probe."""
    parser = flags.parser("train_linear_probe", __doc__)
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, batch_size=64)
    flags.add_compute_flags(parser, seed_of="of the drawn images, the split and the heads")
    add = parser.add_argument
    add("--nsamples", type=flags.positive, default=12000, metavar="N", help="training images, drawn at random")
    add("--test-samples", type=flags.positive, metavar="N", help="test images, drawn at random; all by default")
    add("--held-out", type=share, default=0.1, metavar="X", help="share of the training images that picks the best head")
    add("--solver", choices=("sgd", "lbfgs"), default="sgd", help="sgd is DINOv2's; lbfgs is one logistic regression")
    add("--learning-rates", type=flags.positive_number, nargs="+", metavar="X", help="a head for each; DINOv2's 13 by default")
    add("--epochs", type=flags.positive, default=10, metavar="N", help="passes over the images, 1000 steps at least")
    add("--train-batch-size", type=flags.positive, default=128, metavar="N", help="images in a step of the heads")
    add("--knn", type=flags.positive, default=20, metavar="K", help="neighbours of the baseline")
    add("--cache", type=Path, metavar="DIR", help="keep the features there, and use those of an earlier run")
    add("--output", "-o", type=Path, required=True, metavar="FILE", help="the head file to write (.safetensors)")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def share(text: str) -> float:
    """Parses a number from 0 to below 1, for argparse."""
    return flags.percentage(text) if float(text) < 1 else flags.percentage("100")
