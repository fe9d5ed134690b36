"""Makes the linear layer on the patches of an image, which models write as a convolution, an int8 product.

Conv whose steps are as long as its kernel; Reshape; Transpose    ->    Reshape, Transpose, Reshape; MatMulInt8

Pixels have 8 bits anyway. Weights are rounded to nearest. A convolution with a padding or on images of unknown size stays.
"""

import numpy as np
import onnx_ir as ir
import torch

from vitoats.export.graph import constant, constant_instead, layer_name, new_constant, only_consumer, permutation
from vitoats.format import tiles
from vitoats.format.int8 import round_rows
from vitoats.format.operator import DENSE_INT8, DOMAIN, NEWEST_DOMAIN_VERSION


def fuse_patches(graph: ir.Graph) -> None:
    """Replaces such convolutions of a graph, in place."""
    for conv in list(graph):
        if (conv.domain, conv.op_type) == ("", "Conv"):
            _fuse(graph, conv)


def _fuse(graph: ir.Graph, conv: ir.Node) -> None:
    weight = constant(conv.inputs[1])
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else np.zeros(0 if weight is None else len(weight), np.float32)
    reshape = only_consumer(conv.outputs[0], "Reshape")
    transpose = None if reshape is None else only_consumer(reshape.outputs[0], "Transpose")
    if weight is None or bias is None or reshape is None or transpose is None or permutation(transpose) != (0, 2, 1):
        return
    grid = _grid(conv, weight)
    tokens = transpose.outputs[0]
    if grid is None or tokens.shape is None or tokens.shape.dims[1:] != (grid[0] * grid[1], len(weight)):
        return
    if not np.isfinite(weight).all():
        return
    images, of_weight = conv.inputs[0], conv.inputs[1]
    assert images is not None
    assert of_weight is not None
    name = layer_name(conv)
    (rows, columns), (channels, height, width) = grid, weight.shape[1:]
    batch = tokens.shape.dims[0]
    split = [channels, rows, height, columns, width]
    by_patch = [rows, columns, channels, height, width]
    flat = [rows * columns, channels * height * width]
    patches = images
    for step, op_type, argument, dimensions in (
        ("split", "Reshape", [0, *split], split),
        ("by_patch", "Transpose", [0, 2, 4, 1, 3, 5], by_patch),
        ("patches", "Reshape", [0, *flat], flat),
    ):
        if op_type == "Reshape":
            shape = new_constant(graph, f"{name}.{step}.shape", np.array(argument))
            node = ir.node(op_type, [patches, shape], name=f"{name}.{step}")
        else:
            node = ir.node(op_type, [patches], {"perm": argument}, name=f"{name}.{step}")
        node.metadata_props.update(conv.metadata_props)
        graph.insert_before(conv, node)
        patches = node.outputs[0]
        patches.type, patches.shape = images.type, ir.Shape([batch, *dimensions])
    rounded, scale = round_rows(torch.from_numpy(weight.reshape(len(weight), -1).copy()))
    constants = [
        constant_instead(of_weight, f"{name}.weight", tiles.tiled(rounded.numpy())),
        new_constant(graph, f"{name}.scale", scale.numpy()),
        conv.inputs[2] if len(conv.inputs) > 2 else new_constant(graph, f"{name}.bias", bias),
    ]
    attributes = {"in_features": flat[1]}
    product = ir.node(DENSE_INT8, [patches, *constants], attributes, domain=DOMAIN, version=NEWEST_DOMAIN_VERSION, name=name)
    old = [conv, reshape, transpose]
    ir.convenience.replace_nodes_and_values(graph, transpose, old, [product], [tokens], [product.outputs[0]])


def _grid(conv: ir.Node, weight: np.ndarray) -> tuple[int, int] | None:
    """Rows and columns of patches in an image, if these are all that a convolution looks at, and each once."""
    images = conv.inputs[0]
    kernel = tuple(weight.shape[2:])
    attributes = conv.attributes
    if weight.ndim != 4 or images is None or images.shape is None or images.shape.rank() != 4:
        return None
    if attributes.get_int("group", 1) != 1 or any(attributes.get_ints("pads", (0,))):
        return None
    if tuple(attributes.get_ints("strides", (1, 1))) != kernel or set(attributes.get_ints("dilations", (1,))) != {1}:
        return None
    height, width = images.shape.dims[2:]
    if not isinstance(height, int) or not isinstance(width, int) or height % kernel[0] or width % kernel[1]:
        return None
    return height // kernel[0], width // kernel[1]
