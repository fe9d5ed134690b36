"""A model as an ONNX file: opset 18, IR version 9, dynamic batch, preprocessing in the metadata.

The image size is fixed, or free for models that interpolate their positions (``LoadedModel.with_free_size``).
"""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

import vitoats
from vitoats.common.errors import InputError
from vitoats.common.files import atomic_write
from vitoats.export.external_data import LARGEST_FILE, move_weights, weight_bytes
from vitoats.export.functions import add_functions
from vitoats.export.fuse_attention import fuse_attention
from vitoats.export.fuse_blocks import fuse_blocks
from vitoats.export.fuse_int8 import fuse_int8
from vitoats.export.fuse_patches import fuse_patches
from vitoats.export.gelu import gelu
from vitoats.export.graph import layer_name
from vitoats.export.inline import inlined
from vitoats.export.int8_layers import int8_layers, rounded
from vitoats.export.names import name_after_modules
from vitoats.export.prepare import fold, prepare, warn_of_filled_layers
from vitoats.format.layers import compressed_counts, parameter_count
from vitoats.format.operator import DOMAIN, LINEAR, OPSET
from vitoats.loading.loaded import LoadedModel
from vitoats.models.features import FeatureOutputs
from vitoats.models.inputs import ImageInputs
from vitoats.runtime.inference import METADATA_KEY

IR_VERSION = 9  # the newest that ONNX Runtime 1.17 reads
Form = Literal["sparse", "matmul", "inline", "dense"]


def export_onnx(
    loaded: LoadedModel,
    path: Path,
    form: Form = "sparse",
    about: dict[str, Any] | None = None,
    float16: bool = False,
    int8: bool = False,
    external_data: bool = False,
) -> onnx.ModelProto:
    """Writes a model as ONNX; the file appears whole or not at all.

    Args:
        loaded: the model, compressed or not.
        path: the file to write.
        form: "sparse" has nodes of our operators and their functions; "matmul" has the low-rank terms as separate MatMul nodes;
            "inline" has standard operators only, with the same small tensors; "dense" folds S + U V into plain weights. The
            other forms also fold a float32 layer whose values and mask would not save any bytes.
        about: further metadata: method, compression.
        float16: store S, U and V of the compressed layers as float16 (only S in the form "matmul"); no effect on "dense".
        int8: round the compressed layers to int8, or all linear layers of the blocks of a model without compressed ones. Layers
            that have int8 weights are exported with these anyway, except in the form "dense".
        external_data: write the weights to a second file, ``path`` with .data at its end. Above 2 GB that is always done.

    Returns:
        the model as written.

    Raises:
        InputError: the model cannot be traced, has a weight too large for float16, or has
            int8 weights but is to be written in a form without them.
        RunError: the file cannot be written.
    """
    copied = rounded(loaded) if int8 else copy.deepcopy(loaded)
    model = copied.model.cpu().eval()
    has_int8 = bool(int8_layers(model))
    if has_int8 and (float16 or form == "matmul" or (int8 and form == "dense")):
        raise InputError(
            f"int8 weights cannot be written with {'`float16`' if float16 else f'`form={form!r}`'}: leave that out"
        )
    described = {
        "preprocessing": loaded.preprocessing.to_dict(),
        **({} if loaded.multiple_of is None else {"img_size_multiple_of": loaded.multiple_of}),
        "n_classes": loaded.n_classes,
        **({"outputs": loaded.output_names} if not loaded.n_classes else {}),
        **({"blocks": len(loaded.timm_model.feature_info)} if isinstance(loaded.model, FeatureOutputs) else {}),
        **({"classes": loaded.classes} if loaded.classes else {}),
        "param_count": round(parameter_count(model) / 1e6, 2),
        **compressed_counts(model),
        "form": form,
        **({"weights": "int8"} if has_int8 and form != "dense" else {}),
        **(about or {}),
        "versions": {"vitoats": vitoats.__version__, "torch": torch.__version__},
    }
    warn_of_filled_layers(copied.timm_model, loaded.about)
    fold(model, everything=form == "dense")
    has_nodes = prepare(model, form == "matmul", float16)
    traced = _trace(model, loaded.inputs, loaded.output_names)
    gelu.apply_to_model(traced)
    for node in traced.graph:
        if node.domain == DOMAIN:  # named after its layer, like its values
            node.name = layer_name(node)
    if has_int8 and has_nodes:
        fuse_patches(traced.graph)
        fuse_int8(traced.graph)
    if has_nodes and form == "sparse":
        fuse_attention(traced.graph, bfloat16=has_int8)
    if has_nodes:
        RemoveUnusedNodesPass()(traced)
        fuse_blocks(traced.graph)
    name_after_modules(traced.graph)
    if external_data := external_data or weight_bytes(traced) > LARGEST_FILE:
        move_weights(traced, path)
    proto = ir.serde.serialize_model(traced)
    for noted in _parts(proto.graph):
        del noted.metadata_props[:]  # stack traces from the exporter, with paths of this machine
    add_functions(proto)
    if form == "inline":
        proto = inlined(proto)
    _complete_shapes(proto)
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "vitoats", vitoats.__version__
    described["sparse_nodes"] = sum(node.op_type in LINEAR for node in proto.graph.node)
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(described)})
    with atomic_write(path) as partial:
        if not external_data:
            onnx.checker.check_model(proto, full_check=True)
        partial.write_bytes(proto.SerializeToString())
        if external_data:  # the checker finds the weights beside the file
            onnx.checker.check_model(str(partial), full_check=True)
    return proto


def described_by(about: dict[str, Any], name: str) -> dict[str, Any]:
    """Metadata about a file's origin: the model before compression, and how it was compressed.

    Args:
        about: the content of vitoats.json; empty for a dense model.
        name: the model's name, if ``about`` does not have it.
    """
    return {"model": about.get("model", name)} | {key: about[key] for key in ("method", "compression") if key in about}


def _parts(graph: onnx.GraphProto) -> Iterator[Any]:
    """The graph and everything in it that can carry metadata from the exporter."""
    yield graph
    for parts in (graph.node, graph.value_info, graph.initializer, graph.input, graph.output):
        yield from parts


def _complete_shapes(proto: onnx.ModelProto) -> None:
    """Adds the shapes of values that have none, and removes those of weights, which repeat what the weights say.

    ONNX Runtime's quantization changes weights, and then finds that the shapes contradict them.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    kept = [info for info in proto.graph.value_info if info.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph.value_info
    known = {info.name for info in kept}
    proto.graph.value_info.extend(info for info in inferred if info.name not in known)


def _trace(model: nn.Module, inputs: ImageInputs, output_names: tuple[str, ...]) -> ir.Model:
    """Traces with a batch of 2 (a batch of 1 would be treated as a constant)."""
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (inputs.traced.zeros(2),),
                input_names=list(inputs.names),
                output_names=list(output_names),
                opset_version=OPSET,
                dynamic_shapes=inputs.dynamic_axes,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps every error
        raise InputError(f"the model cannot be traced to ONNX: {' '.join(str(error).split())[:200]}") from None
    assert program is not None
    return program.model
