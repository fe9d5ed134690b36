"""Trains a linear head on a frozen backbone's features.

    python tools/train_linear_probe.py --model dinov2s_derived --data-dir /usr/share/datasets/fashion-mnist \
        --nsamples 12000 --output head.safetensors

Features are computed once; the head is a logistic regression. Accuracy is that on the test images of ``--data-dir``.
"""

import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common
from vitoats.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from vitoats.models.loading import LoadedModel


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, trains, writes the head file; returns the JSON line."""
    parser = common.parser("train_linear_probe", (__doc__ or "").split("\n")[0])
    common.add_model_flags(parser)
    common.add_data_flags(parser, batch_size=64)
    common.add_compute_flags(parser)
    parser.add_argument("--nsamples", type=common.positive, default=12000, metavar="N", help="training images, drawn at random")
    parser.add_argument("--test-samples", type=common.positive, default=4000, metavar="N", help="test images, drawn at random")
    parser.add_argument(
        "--output", "-o", type=Path, required=True, metavar="FILE", help="the head file to write (.safetensors)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    args = common.parse(parser, argv)
    if args.data_dir is None:
        raise InputError("there are no images to train on: give --data-dir a folder with one subfolder for each class")
    common.check_output_file(args.output, args.overwrite)

    from vitoats.evaluate.probe import train_linear_head
    from vitoats.models.heads import HeadInfo, save_head

    common.set_threads(args.threads)
    start = time.perf_counter()
    loaded = common.load(args, with_head=False)
    layers = args.head_layers or 1

    x, y, classes = features_of(loaded, args, "train", args.nsamples, layers)
    x_test, y_test, _ = features_of(loaded, args, "test", args.test_samples, layers)
    weight, bias = train_linear_head(x, y, len(classes))
    correct = int(((x_test @ weight.T + bias).argmax(dim=1) == y_test).sum())
    info = HeadInfo(backbone=args.model, img_size=loaded.preprocessing.img_size, layers=layers, classes=classes)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_head(args.output, weight, bias, info)
    return {
        "model": args.model,
        "head": str(args.output),
        "layers": layers,
        "top1": round(100 * correct / len(y_test), 4),
        "n_train": len(y),
        "n_images": len(y_test),
        "seconds": round(time.perf_counter() - start, 1),
    }


def features_of(
    loaded: "LoadedModel", args: Namespace, split: str, wanted: int, layers: int
) -> tuple["Tensor", "Tensor", tuple[str, ...]]:
    """Features, labels and class names of images drawn at random from a split."""
    import torch

    from vitoats.data.images import batches, open_images
    from vitoats.evaluate.probe import extract_features

    dataset = open_images(args.data_dir, split, loaded.preprocessing.transform())
    if not dataset.classes:
        raise InputError("these images have no labels: training needs a folder with one subfolder for each class")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))[:wanted].tolist()
    with common.Bar(f"features ({split})", args.quiet) as bar:
        stream = batches(dataset, order, args.batch_size, args.workers)
        x, y = extract_features(loaded.timm_model, stream, layers, lambda done: bar.update(done, len(order)))
    return x, y, dataset.classes
