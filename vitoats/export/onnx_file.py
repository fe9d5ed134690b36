"""A model as an ONNX file: opset 18, IR version 9, dynamic batch, fixed image size, preprocessing in the metadata."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx.inliner
import torch
from torch import nn

import vitoats
from vitoats.common.errors import InputError
from vitoats.common.files import atomic_write
from vitoats.export.gelu import gelu
from vitoats.export.layers import ExportedSparseLowRankLinear, LowRankForm
from vitoats.export.sparse_matmul import sparse_matmul_function
from vitoats.format import bitmask
from vitoats.format.layers import compressed_counts, compressed_layers, parameter_count, replace_module
from vitoats.format.operator import DOMAIN, DOMAIN_VERSION, OPSET
from vitoats.loading.loaded import LoadedModel
from vitoats.models.inputs import ImageInputs
from vitoats.runtime.inference import METADATA_KEY

IR_VERSION = 9  # the newest that ONNX Runtime 1.17 reads
LARGEST_FILE = 2**31 - 1  # bytes; the limit of protobuf

Form = Literal["sparse", "matmul", "inline", "dense"]


def export_onnx(
    loaded: LoadedModel, path: Path, form: Form = "sparse", about: dict[str, Any] | None = None, float16: bool = False
) -> onnx.ModelProto:
    """Writes a model as ONNX; the file appears whole or not at all.

    Args:
        loaded: the model, compressed or not.
        path: the file to write.
        form: "sparse" has SparseMatMul nodes and their function; "matmul" has the low-rank terms as separate MatMul nodes;
            "inline" has standard operators only, with the same small tensors; "dense" folds S + U V into plain weights. The
            other forms also fold a layer whose values and mask would not save any bytes.
        about: further metadata: method, compression.
        float16: store S, U and V of the compressed layers as float16 (only S in the form "matmul"); no effect on "dense".

    Returns:
        the model as written.

    Raises:
        InputError: the model cannot be traced, exceeds the size of an ONNX file, or has a weight too large for float16.
        RunError: the file cannot be written.
    """
    model = copy.deepcopy(loaded.model).cpu().eval()
    for name, layer in compressed_layers(model).items():
        if form == "dense" or not bitmask.saves(layer.out_features, layer.in_features, layer.kept_parameters):
            replace_module(model, name, layer.folded())  # a dense product is faster, and no larger
    layers = compressed_layers(model)
    low_rank: LowRankForm = "nodes" if form == "matmul" else "inputs"
    if not any(layer.rank for layer in layers.values()):
        low_rank = "none"
    for name, layer in layers.items():
        replace_module(model, name, ExportedSparseLowRankLinear(layer, low_rank, float16))
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # fused attention is exported as more nodes, not fewer
            module.fused_attn = False  # type: ignore[assignment]
    proto = _trace(model, loaded.inputs)
    for noted in _parts(proto.graph):
        del noted.metadata_props[:]  # stack traces from the exporter, with paths of this machine
    for node in proto.graph.node:
        if node.domain == DOMAIN:  # named after its layer, like its values
            node.name = node.input[1].removesuffix(".values")
    if layers:
        if not any(o.domain == DOMAIN for o in proto.opset_import):
            proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
        proto.functions.append(sparse_matmul_function(6 if low_rank == "inputs" else 4))
        if form == "inline":
            proto = _inlined(proto)
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "vitoats", vitoats.__version__
    described = {
        "preprocessing": loaded.preprocessing.to_dict(),
        "n_classes": loaded.n_classes,
        **({"classes": loaded.classes} if loaded.classes else {}),
        "param_count": round(parameter_count(loaded.model) / 1e6, 2),
        **compressed_counts(loaded.model),
        "form": form,
        **(about or {}),
        "versions": {"vitoats": vitoats.__version__, "torch": torch.__version__},
    }
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(described)})
    onnx.checker.check_model(proto, full_check=True)
    _write(proto, path)
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


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Replaces SparseMatMul by its body. CastLike becomes Cast, since ONNX Runtime folds CastLike only inside functions."""
    proto = onnx.inliner.inline_local_functions(proto)
    for node in proto.graph.node:
        if node.op_type == "CastLike":
            node.op_type = "Cast"
            del node.input[1:]
            node.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.FLOAT))
    return proto


def _trace(model: nn.Module, inputs: ImageInputs) -> onnx.ModelProto:
    """Traces with a batch of 2 (a batch of 1 would be treated as a constant)."""
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    dynamic = tuple({axis: torch.export.Dim(name) for axis, name in axes.items()} for axes in inputs.dynamic_axes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (inputs.zeros(2),),
                input_names=list(inputs.names),
                output_names=list(inputs.output_names),
                opset_version=OPSET,
                dynamic_shapes=dynamic,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps every error
        raise InputError(f"the model cannot be traced to ONNX: {' '.join(str(error).split())[:200]}") from None
    assert program is not None
    gelu.apply_to_model(program.model)
    return program.model_proto


def _write(proto: onnx.ModelProto, path: Path) -> None:
    if proto.ByteSize() > LARGEST_FILE:
        raise InputError(
            f"the model takes {proto.ByteSize() / 1e9:.2f} GB, more than an ONNX file can hold (2 GB): compress it further"
        )
    with atomic_write(path) as partial:
        partial.write_bytes(proto.SerializeToString())
