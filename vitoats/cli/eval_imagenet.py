"""Top-1 and top-5 accuracy of a model, a compressed folder or an ONNX file on labelled images, like timm's validate.py.

    python tools/eval_imagenet.py --model runs/vitb14 --data-dir imagenet/val --head dinov2_vitb14_linear_head.pth
    python tools/eval_imagenet.py --model model.onnx --data-dir imagenet/val --results-file results.csv
    python tools/eval_imagenet.py --model features.onnx --head head.safetensors --data-dir imagenet/val
    python tools/eval_imagenet.py --model features.onnx --against dense_features.onnx --data-dir imagenet/val

The model's own preprocessing is used; an ONNX file stores it in its metadata. torchrun splits the images over processes.
"""

import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags, record, report_page
from vitoats.common.errors import InputError
from vitoats.common.machine import cores
from vitoats.common.sizes import image_size

if TYPE_CHECKING:
    from vitoats.data.transforms import Preprocessing
    from vitoats.evaluation.accuracy import Accuracy
    from vitoats.evaluation.target import Target


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, evaluates; returns the JSON line with timm's columns."""
    return record.recorded("eval_imagenet", config_file.parse(make_parser(), argv), argv, execute)


def execute(args: Namespace) -> dict[str, Any]:
    """Evaluates; returns the JSON line."""
    if args.data and args.data_dir:
        raise InputError("the images are named twice: give the folder itself, or --data-dir, not both")
    args.data_dir = args.data or args.data_dir
    if args.input_size:
        _, *size = args.input_size
        if args.img_size not in (None, image_size(*size)):
            raise InputError("--input-size and --img-size contradict each other: leave one of them out")
        args.img_size = image_size(*size)

    from vitoats.common import ranks

    if args.against:
        if args.report:
            raise InputError("--report is about accuracy, which --against does not measure: leave one of them out")
        return run_against(args)
    report_page.check(args.report)
    with ranks.joined(args.device):
        result, first = run(args), ranks.is_first()
    if first:
        from vitoats.loading.checkpoint import is_checkpoint

        folder = Path(args.model)
        report_page.after(args, [folder] if is_checkpoint(folder) else [], result, data=args.data_dir)
    return result


def run(args: Namespace) -> dict[str, Any]:
    """Evaluates this process's share of the images; returns the JSON line for all images."""
    from vitoats.common import ranks
    from vitoats.common.devices import set_threads
    from vitoats.evaluation.protocol import Protocol, open_test_set

    if ranks.size() > 1 and not args.threads:
        args.threads = max(1, cores() // ranks.on_this_machine())
    threads = set_threads(args.threads)
    start = time.perf_counter()
    target = open_target(args)
    preprocessing = chosen(target.preprocessing, args)
    common.log.info("data processing: %s", preprocessing)
    protocol = Protocol(
        images=args.data_dir,
        dataset=args.dataset,
        split=args.split,
        num_samples=args.num_samples,
        class_map=args.class_map,
        real_labels=args.real_labels,
        valid_labels=args.valid_labels,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    test_set = open_test_set(protocol, target, preprocessing)
    with common.Bar("images", args.quiet or args.log_freq is not None) as bar:

        def progress(seen: "Accuracy") -> None:
            done, batch = seen.n_images * ranks.size(), -(-seen.n_images // args.batch_size)
            of = test_set.n_images or done  # the length of a stream is unknown
            bar.update(min(done, of), of, f"Acc@1 {seen.top1:.3f}")
            if args.log_freq and batch % args.log_freq == 0:
                common.log.info("Test: [%d/%d]  Acc@1: %.3f  Acc@5: %.3f", min(done, of), of, seen.top1, seen.top5)

        result = test_set.evaluate(target, progress)
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
        "param_count": target.param_count,
        "img_size": preprocessing.img_size,
        "crop_pct": preprocessing.crop_pct,
        "interpolation": preprocessing.interpolation,
        "crop_mode": preprocessing.crop_mode,
        "n_images": result.n_images,
        "n_skipped": max(0, test_set.n_images - result.n_images),
        "n_correct1": result.correct1,
        "n_correct5": result.correct5,
        **target.compression,
        "file_mb": target.file_mb,
        "images_per_sec": round(result.n_images / result.seconds, 1),
        "device": args.device,
        "threads": threads,
        "processes": ranks.size(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def run_against(args: Namespace) -> dict[str, Any]:
    """Compares the features of two ONNX files; returns the JSON line."""
    from vitoats.common.devices import set_threads
    from vitoats.common.noted import note
    from vitoats.data.images import batches, digest, open_images
    from vitoats.evaluation.exported import open_exported
    from vitoats.evaluation.feature_error import feature_errors
    from vitoats.evaluation.protocol import spread

    if not args.model.endswith(".onnx") or not args.against.endswith(".onnx"):
        raise InputError(
            "--against compares two files that export_onnx --features wrote: give --model and --against such files"
        )
    common.refuse_for_files(args)
    for flag in ("head", "head_layers", "head_name", "dataset", "class_map", "real_labels", "valid_labels"):
        if getattr(args, flag):
            raise InputError(f"--against looks at features, not at classes: leave --{flag.replace('_', '-')} out")
    if args.data_dir is None:
        raise InputError("there are no images to compare on: give --data-dir a folder")
    threads = set_threads(args.threads)
    file, dense = (open_exported(path, threads, args.img_size) for path in (args.model, args.against))
    dataset = open_images(args.data_dir, "test", chosen(file.preprocessing, args).transform())
    order = spread(list(range(len(dataset))), args.num_samples)
    note(lambda: {"test images": digest(dataset, order)})
    with common.Bar("images", args.quiet) as bar:
        stream = batches(dataset, order, args.batch_size, args.workers)
        errors = feature_errors(file, dense, stream, lambda done: bar.update(done, len(order)))
    for name, figures in errors.items():
        common.log.info("%s: relative feature error %.4f, mean cosine %.4f", name, figures["relative_error"], figures["cosine"])
    return {"model": args.model, "against": args.against, "n_images": len(order), "features": errors}


def open_target(args: Namespace) -> "Target":
    """Opens the model of --model: an ONNX file in ONNX Runtime, anything else in torch."""
    from vitoats.evaluation.target import onnx_target, torch_target
    from vitoats.loading.head_files import HeadFile

    if args.model.endswith(".onnx"):
        common.refuse_for_files(args)
        head = HeadFile(args.head, args.head_layers, args.head_name) if args.head else None
        if head is None and (args.head_layers or args.head_name):
            raise InputError("--head-layers and --head-name are for --head: add that, or leave them out")
        return onnx_target(args.model, args.threads, args.img_size, head)

    import torch

    from vitoats.common.devices import check_device

    device = check_device(args.device)
    amp_dtype = None
    if args.amp:
        amp_dtype = getattr(torch, args.amp_dtype or ("bfloat16" if device == "cpu" else "float16"))
    elif args.amp_dtype:
        raise InputError("--amp-dtype is the type for --amp: add that, or leave it out")
    return torch_target(common.load(args), device, amp_dtype)


def chosen(own: "Preprocessing", args: Namespace) -> "Preprocessing":
    """The model's preprocessing, overridden by the flags."""
    channels = args.input_size[0] if args.input_size else own.channels
    if channels != own.channels:
        remedy = f"leave --input-size out, or add --model-kwargs in_chans={channels}"
        raise InputError(f"{args.model} takes images of {own.channels} channels, not {channels}: {remedy}")
    return own.changed(args.crop_mode, {key: getattr(args, key) for key in ("mean", "std", "interpolation", "crop_pct")})


def make_parser() -> flags.ArgumentParser:
    """The flags of eval_imagenet."""
    parser = flags.parser("eval_imagenet", __doc__)
    parser.add_argument("data", nargs="?", metavar="DIR", help="the images (or use --data-dir)")
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, batch_size=64, workers=min(2, cores()))
    flags.add_compute_flags(parser, seed_of="changes nothing: nothing here is drawn at random")
    add = parser.add_argument
    add("--pretrained", action="store_true", help="the weights that the name stands for: always so without --checkpoint")
    add("--dataset", default="", metavar="KIND/NAME", help="a data set by timm's name: torch/cifar10, hfds/owner/name, ...")
    add("--split", default="validation", help="which split: validation, train, or the name of a folder in --data-dir")
    add("--num-samples", type=flags.positive, metavar="N", help="evaluate N images only, evenly spaced over the set")
    add("--class-map", type=Path, metavar="FILE", help="a .txt file with one class name on each line, in the model's order")
    add("--real-labels", type=Path, metavar="FILE", help="real.json of 'Are we done with ImageNet?'")
    add("--valid-labels", type=Path, metavar="FILE", help="which outputs count, one index a line, for images of some classes")
    add("--input-size", type=flags.positive, nargs=3, metavar=("C", "H", "W"), help="image size in timm's other way")
    add("--amp", action="store_true", help="run torch models under autocast")
    add("--amp-dtype", choices=("float16", "bfloat16"), help="for --amp; float16, but bfloat16 on a CPU, where not given")
    flags.add_report(parser)
    add("--against", metavar="FILE", help="compare the features of two ONNX files instead: the dense one of --model's")
    add("--log-freq", type=flags.positive, metavar="N", help="log a line every N batches instead of a progress bar")
    return parser
