"""Exports a model or a compressed folder to ONNX.

    python tools/export_onnx.py runs/vitb14 -o vitb14.onnx
    python tools/export_onnx.py --model vit_base_patch16_224 -o dense.onnx
    python tools/export_onnx.py runs/smollm2 -o smollm2-onnx

A compressed layer becomes a SparseMatMul node, or one with int8 weights; the file defines it as a function of standard
operators. --inline writes standard operators only, --dense folds S + UV, --float16 stores S, U and V in half the bytes. --int8
rounds weights to int8 without looking at images; compress --weights int8 does it better. The batch size is dynamic, the image
size fixed unless --dynamic-img-size is given. --verify compares the file with torch, on noise and on the images of --data-dir.
A language model becomes a folder with a key-value cache, for generate, eval_perplexity and ONNX Runtime GenAI.
"""

import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, export_decoder, flags, record
from vitoats.common.errors import InputError

if TYPE_CHECKING:
    from vitoats.loading.loaded import LoadedModel


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, exports; returns the JSON line."""
    return record.recorded("export_onnx", config_file.parse(make_parser(), argv), argv, execute)


def execute(args: Namespace) -> dict[str, Any]:
    """Exports and verifies; returns the JSON line."""
    name = args.folder or args.model
    if name is None or (args.folder and args.model):
        raise InputError("name one model to export: a folder, or --model NAME")
    if common.is_language_model(name):
        return export_decoder.export(name, args)
    if args.genai_library:
        raise InputError(f"--genai-library is for language models, and {name} is none: leave it out")
    if args.output.suffix != ".onnx":
        raise InputError(f"{args.output} does not end in .onnx: give --output a file such as model.onnx")
    if args.float16 and args.dense:
        raise InputError("--float16 stores S, U and V, which --dense folds: leave one of them out")
    if args.int8 and (args.float16 or args.matmul or args.dense):
        raise InputError("--int8 weights have no form for --float16, --matmul and --dense: leave one of them out")
    if args.features and (args.head or args.head_layers or args.head_name):
        raise InputError("--features gives tokens instead of a head's logits: leave --head out, and give it to eval_imagenet")
    for flag in ("data_dir", "num_samples"):
        if getattr(args, flag) and not args.verify:
            raise InputError(f"--{flag.replace('_', '-')} is for --verify: add that, or leave it out")
    from vitoats.common.devices import set_threads
    from vitoats.common.outputs import check_output_file
    from vitoats.runtime.inference import data_file, stored_bytes

    for file in (args.output, data_file(args.output)):  # large models get the second one even without --external-data
        check_output_file(file, args.overwrite)
    set_threads(args.threads)

    from vitoats.export.int8_layers import rounded
    from vitoats.export.onnx_file import Form, described_by, export_onnx
    from vitoats.format.operator import LINEAR

    start = time.perf_counter()
    args.model = name
    loaded = common.load(args)
    if args.features:
        loaded = loaded.with_features(args.features)
    if args.dynamic_img_size:
        loaded = loaded.with_free_size()
    images = images_to_verify(loaded, args) if args.verify else None
    form: Form = "inline" if args.inline else "matmul" if args.matmul else "dense" if args.dense else "sparse"
    common.log.info("tracing")
    proto = export_onnx(
        loaded, args.output, form, described_by(loaded.about, name), args.float16, args.int8, args.external_data
    )
    result = {
        "model": name,
        "output": str(args.output),
        "form": form,
        "float16": args.float16,
        "int8": any(tensor.data_type == tensor.INT8 for tensor in proto.graph.initializer),
        "onnx_mb": round(stored_bytes(args.output) / 1e6, 3),
        "sparse_nodes": sum(node.op_type in LINEAR for node in proto.graph.node),
        "img_size": loaded.preprocessing.img_size,
        **({} if loaded.multiple_of is None else {"img_size_multiple_of": loaded.multiple_of}),
    }
    if args.verify:
        result |= verified(rounded(loaded) if args.int8 else loaded, images, args)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def images_to_verify(loaded: "LoadedModel", args: Namespace) -> Any:
    """The images of --data-dir, or those of the embedded model; None if there are none."""
    from vitoats.common.noted import note
    from vitoats.data.images import SAMPLE, digest, open_images
    from vitoats.loading.names import EMBEDDED

    own = SAMPLE if loaded.n_classes and loaded.source == EMBEDDED else None
    found = args.data_dir or own
    if found is None:
        return None
    dataset = open_images(found, "test", loaded.preprocessing.transform())
    note(lambda: {"images to verify": digest(dataset, range(len(dataset))[: args.num_samples])})
    return dataset


def verified(loaded: "LoadedModel", dataset: Any, args: Namespace) -> dict[str, Any]:
    """Compares the file with torch and logs the differences; returns them for the JSON line."""
    from vitoats.data.images import batches
    from vitoats.export.verify import verify
    from vitoats.runtime import session

    exported = session(args.output, args.threads)
    common.log.info("comparing with torch")
    agreement, names = verify(loaded, exported), []
    if dataset is not None:
        order = list(range(len(dataset)))[: args.num_samples]
        agreement = verify(loaded, exported, batches(dataset, order, args.batch_size, args.workers))
        paths = (
            getattr(dataset, "paths", []) if agreement.n_images == len(order) else []
        )  # if some were unreadable, names would not match positions
        names = [paths[i] if paths else f"image {i}" for i, _ in agreement.differing]
    common.log.info(
        "largest difference from torch: %.1e of the largest output, at batch 1, 2 and 7; of an output on %d images: %.1e",
        agreement.relative_error,
        agreement.n_images,
        agreement.logit_error,
    )
    margins = [margin for _, margin in agreement.differing]
    for name, margin in zip(names, margins, strict=True):
        kind = "a tie" if margin <= 2 * agreement.logit_error else "no tie"
        common.log.info("another class for %s: margin %.1e in torch, %s", name, margin, kind)
    return {
        "native_nodes": len(exported.native_nodes),
        "relative_error": agreement.relative_error,
        "n_images": agreement.n_images,
        "logit_error": agreement.logit_error,
        "differing": [{"image": name, "margin": margin} for name, margin in zip(names, margins, strict=True)],
    }


def make_parser() -> flags.ArgumentParser:
    """The flags of export_onnx."""
    parser = flags.parser("export_onnx", __doc__)
    parser.add_argument("folder", nargs="?", metavar="DIR", help="a folder that compress wrote (or use --model)")
    flags.add_model_flags(parser, required=False)
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FILE", help="the .onnx file, or folder, to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--inline", action="store_true", help="standard operators only, for other runtimes")
    forms.add_argument("--matmul", action="store_true", help="low-rank terms as MatMul nodes beside the sparse ones; slower")
    forms.add_argument("--dense", action="store_true", help="fold S + UV into plain weights")
    parser.add_argument("--float16", action="store_true", help="store S, U and V as float16; the arithmetic stays float32")
    parser.add_argument(
        "--int8", action="store_true", help="int8 weights: compressed layers', or all of a dense model's blocks"
    )
    parser.add_argument(
        "--features",
        metavar="KIND",
        help="tokens instead of logits: cls, patches, all, layers=4 (the last four) or layers=2,5,8,11 (counted from 0)",
    )
    parser.add_argument(
        "--dynamic-img-size",
        action="store_true",
        help="free height and width, multiples of the patch size: positions are interpolated in the file",
    )
    parser.add_argument("--external-data", action="store_true", help="weights in FILE.data; always so above 2 GB")
    parser.add_argument(
        "--verify", action="store_true", help="compare the file with torch, on noise and on --data-dir's images"
    )
    parser.add_argument(
        "--genai-library", action="store_true", help="language models: copy the native library for ONNX Runtime GenAI"
    )
    flags.add_data_flags(parser, batch_size=50)
    parser.add_argument("--num-samples", type=flags.positive, metavar="N", help="verify on the first N images only")
    parser.add_argument("--threads", type=flags.non_negative, default=0, metavar="N", help="CPU threads; 0 takes all cores")
    return parser
