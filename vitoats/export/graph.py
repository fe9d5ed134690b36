"""What the rewrites of a traced graph share: constants, uses, and the replacement of nodes by one of ours."""

import ast
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from vitoats.format.operator import DOMAIN, NEWEST_DOMAIN_VERSION

NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # the exporter's name for none


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value as an array if it is a constant of the graph."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def number(value: ir.Value | None) -> float | None:
    """The value as a number if it is a constant of one element."""
    array = constant(value)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, one for each use; empty if it is an output of the graph, too."""
    return [] if value.is_graph_output() else [node for node, _ in value.uses()]


def new_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new constant of a graph. Its name gets something at its end if it is taken."""
    while name in graph.initializers:
        name += ".folded"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def constant_instead(old: ir.Value, name: str, array: np.ndarray) -> ir.Value:
    """A new constant in the graph of an old one. Other layers may read the old one, as the exporter stores equal ones once."""
    graph = old.graph
    assert graph is not None
    if len(consumers(old)) == 1 and old.name is not None:
        name = old.name
        del graph.initializers[name]
    return new_constant(graph, name, array)


def only_consumer(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only node that reads a value, if it is of one of these standard types."""
    nodes = consumers(value)
    return nodes[0] if len(nodes) == 1 and nodes[0].domain == "" and nodes[0].op_type in op_types else None


def produced_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes a value, if it is of one of these standard types."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other input of a node with two."""
    first, second = node.inputs
    return second if first is value else first


def permutation(node: ir.Node) -> tuple[int, ...]:
    """The order of axes of a Transpose."""
    return tuple(node.attributes.get_ints("perm", ()))


def layer_name(node: ir.Node) -> str:
    """The name of the module whose forward the exporter was tracing when it made the node; "" for the model itself."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2] if len(scopes) > 1 and scopes[-2] != NO_MODULE else ""


def replace(
    old: Sequence[ir.Node],
    op_type: str,
    name: str | None,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int | float],
) -> ir.Node:
    """Puts one node of our domain in the place of the last of some nodes; the others must not be read by any more nodes."""
    last = old[-1]
    graph = last.graph
    assert isinstance(graph, ir.Graph)
    new = ir.node(op_type, inputs, attributes, domain=DOMAIN, version=NEWEST_DOMAIN_VERSION, name=name)
    ir.convenience.replace_nodes_and_values(graph, last, old, [new], [last.outputs[0]], [new.outputs[0]])
    return new
