"""Top-1 and top-5 accuracy of a model, a compressed folder or an ONNX file on labelled images.

    python tools/eval_imagenet.py --model runs/vitb14 --data-dir imagenet/val --head dinov2_vitb14_linear_head.pth
    python tools/eval_imagenet.py --model model.onnx --data-dir imagenet/val

Preprocessing is the model's own; an ONNX file carries it in its metadata.
"""

import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from vitoats.cli import common
from vitoats.errors import InputError

if TYPE_CHECKING:
    from vitoats.evaluate.target import Target


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, evaluates; returns the JSON line with timm's columns."""
    parser = common.parser("eval_imagenet", (__doc__ or "").split("\n")[0])
    common.add_model_flags(parser)
    common.add_data_flags(parser, batch_size=64)
    common.add_compute_flags(parser)
    parser.add_argument("--num-samples", type=common.positive, metavar="N", help="evaluate the first N images only")
    args = common.parse(parser, argv)
    threads = common.set_threads(args.threads)
    start = time.perf_counter()
    target = open_target(args)

    from vitoats.data.images import SAMPLE, batches, open_images
    from vitoats.evaluate.accuracy import evaluate

    if args.data_dir is None:
        if not target.embedded:
            raise InputError("there are no images to evaluate: give --data-dir a folder with one subfolder for each class")
        args.data_dir = SAMPLE
    dataset = open_images(args.data_dir, "test", target.preprocessing.transform())
    order = list(range(len(dataset)))[: args.num_samples]
    with common.Bar("images", args.quiet) as bar:
        result = evaluate(
            target.predict,
            batches(dataset, order, args.batch_size, args.workers),
            len(dataset.classes) or None,
            lambda done: bar.update(done, len(order)),
        )
    common.log.info(
        " * Acc@1 %.3f (%.3f) Acc@5 %.3f (%.3f) on %d images",
        result.top1,
        100 - result.top1,
        result.top5,
        100 - result.top5,
        result.n_images,
    )
    return {
        "model": args.model,
        "top1": round(result.top1, 4),
        "top1_err": round(100 - result.top1, 4),
        "top5": round(result.top5, 4),
        "top5_err": round(100 - result.top5, 4),
        "n_images": result.n_images,
        "param_count": target.param_count,
        "img_size": target.preprocessing.img_size,
        "crop_pct": target.preprocessing.crop_pct,
        "interpolation": target.preprocessing.interpolation,
        "images_per_sec": round(result.n_images / result.seconds, 1),
        "device": args.device,
        "threads": threads,
        "seconds": round(time.perf_counter() - start, 1),
    }


def open_target(args: Namespace) -> "Target":
    """Opens what --model names: an ONNX file in ONNX Runtime, anything else in torch."""
    from vitoats.evaluate.target import onnx_target, torch_target

    if args.model.endswith(".onnx"):
        for flag in ("checkpoint", "head", "head_layers", "img_size", "random_weights"):
            if getattr(args, flag):
                raise InputError(f"an ONNX file is evaluated as it is: leave --{flag.replace('_', '-')} out")
        if args.device != "cpu":
            raise InputError("an ONNX file runs on the CPU: leave --device out")
        return onnx_target(args.model, args.crop_mode, args.threads)

    loaded = common.load(args)
    return torch_target(loaded, common.check_device(args.device))
