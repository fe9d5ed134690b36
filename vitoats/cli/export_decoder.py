"""The export of a language model, for export_onnx: a folder with a key-value cache."""

import time
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from vitoats.cli import common
from vitoats.common.errors import InputError

FOR_IMAGES = ("inline", "matmul", "features", "dynamic_img_size", "data_dir", "num_samples", *common.MODEL_FLAGS)


def export(name: str, args: Namespace) -> dict[str, Any]:
    """Exports the language model that ``name`` stands for; returns the JSON line."""
    for flag in FOR_IMAGES:
        if getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')} is for vision models, and {name} is a language model: leave it out")
    if args.output.suffix == ".onnx":
        raise InputError(f"{name} is a language model, which becomes a folder: give --output {args.output.with_suffix('')}")

    from vitoats.common.devices import set_threads
    from vitoats.common.outputs import check_output_folder
    from vitoats.export.decoder import DecoderForm, check_decoder, export_decoder
    from vitoats.export.onnx_file import described_by
    from vitoats.export.verify_decoder import as_stored, verify_decoder
    from vitoats.format.operator import LINEAR
    from vitoats.loading.language_models import load_language_model
    from vitoats.runtime.decoder import CONFIG, MODEL, Decoder
    from vitoats.runtime.inference import stored_bytes

    start = time.perf_counter()
    check_output_folder(args.output, args.overwrite, CONFIG, "export_onnx")
    set_threads(args.threads)
    loaded = load_language_model(name)
    form: DecoderForm = "dense" if args.dense else "sparse"
    options = (args.float16, args.int8, args.genai_library)
    check_decoder(loaded, form, *options)
    proto = export_decoder(loaded, args.output, form, described_by(loaded.about, name), *options, args.overwrite)
    result = {
        "model": name,
        "output": str(args.output),
        "form": form,
        "float16": args.float16,
        "int8": any(tensor.data_type == tensor.INT8 for tensor in proto.graph.initializer),
        "onnx_mb": round(stored_bytes(args.output / MODEL) / 1e6, 3),
        "sparse_nodes": sum(node.op_type in LINEAR for node in proto.graph.node),
    }
    if args.verify:
        common.log.info("comparing with torch")
        decoder = Decoder(args.output, args.threads)
        agreement = verify_decoder(as_stored(loaded, args.float16, args.int8), decoder)
        common.log.info(
            "largest difference of a logit from torch: %.1e of the largest",
            max(agreement.relative_error, agreement.step_error),
        )
        common.log.info("%s", agreement)
        result |= {"native_nodes": len(decoder.session.native_nodes), **asdict(agreement)}
    return result | {"seconds": round(time.perf_counter() - start, 1)}
