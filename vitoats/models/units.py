"""Attention heads, key-value groups and MLP neurons as removable units: locating and removing their weights.

A unit consists of a slice of rows in the matrices that produce it, and a slice of columns in the matrix that reads it:

    head h      rows of q, k and v (each third of a fused qkv, biases included; also of a gate)   columns of proj
    group g     rows of q for all of its heads, of one head of k and of v (also if they are fused)   columns of o_proj
    neuron i    row of fc1 (of both halves, gate and up, if fc1 is a packed SwiGLU)               column of fc2

Units are found by the attributes of the attention and MLP classes of timm and transformers. ``why_not`` checks on hidden states
that a block without some units computes the same as with these units zeroed. A norm across units, or parameters with one
entry per head, fail there.
"""

import copy
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitoats.models.blocks import Block

ATTENTION_INPUTS = ("qkv", "q_proj", "k_proj", "v_proj", "gate")
GROUPED_INPUTS = ("qkv_proj", "q_proj", "k_proj", "v_proj")
Kind = Literal["heads", "groups", "neurons"]
NAMES: dict[Kind, str] = {"heads": "heads", "groups": "key-value groups", "neurons": "neurons"}
MLPS = (  # the layers that produce the neurons, as far as a module has them, and the layer that reads them
    (("fc1", "fc1_g", "fc1_x"), "fc2"),  # timm, OPT
    (("gate_proj", "up_proj", "gate_up_proj"), "down_proj"),  # Llama and its like, Phi-3
    (("c_fc",), "c_proj"),  # GPT-2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
)
KEPT = "kept_units"  # attribute of a reduced module: its number of units
TOLERANCE = 1e-4  # between zeroed and removed units, relative to the largest output


@dataclass(frozen=True)
class Units:
    """The units of one module.

    Attributes:
        module: dotted name of the attention or MLP.
        kind: kind of units.
        count: number of units.
        width: columns of the output layer per unit: the head's width, that of a group's heads, or 1.
        inputs: the linear layers whose rows produce the units: by name, the rows per unit of each matrix that one stacks.
        output: name of the linear layer whose columns read the units.
        weights: elements of all weight matrices per unit, without biases.
    """

    module: str
    kind: Kind
    count: int
    width: int
    inputs: dict[str, tuple[int, ...]]
    output: str
    weights: int

    @property
    def stacked(self) -> int:
        """Number of matrices in the inputs: 3 for q, k and v, 1 for a plain MLP, 2 for a gated one."""
        return sum(map(len, self.inputs.values()))

    def columns(self, units: Tensor) -> Tensor:
        """Indices [n * width] of the output layer's columns that belong to the units [n]."""
        return _entries(units, self.width)

    def rows(self, name: str, units: Tensor) -> Tensor:
        """Indices of the rows of an input layer that belong to the units [n]."""
        starts = itertools.accumulate(self.inputs[name], initial=0)
        return torch.cat([start * self.count + _entries(units, w) for start, w in zip(starts, self.inputs[name], strict=False)])


def _entries(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def find_units(model: nn.Module, block_name: str) -> list[Units]:
    """The units of each attention and MLP of a block in which they can be located, in order."""
    found: list[Units | None] = []
    for name, module in model.get_submodule(block_name).named_modules(prefix=block_name):
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int) and isinstance(getattr(module, "proj", None), nn.Linear):
            found.append(_units(name, module, "heads", heads, ATTENTION_INPUTS, "proj"))
        if isinstance(getattr(module, "num_key_value_groups", None), int) and isinstance(
            getattr(module, "o_proj", None), nn.Linear
        ):
            found.append(_groups(name, module))
        for inputs, output in MLPS:
            if isinstance(getattr(module, output, None), nn.Linear):
                found.append(_units(name, module, "neurons", linear(module, output).in_features, inputs, output))
    return [units for units in found if units is not None]


def _units(name: str, module: nn.Module, kind: Kind, count: int, candidates: tuple[str, ...], output: str) -> Units | None:
    """The units of a module, each with as many rows in each matrix as columns; None if the sizes of its layers do not match."""
    total = linear(module, output).in_features
    makes = _linears(module, candidates)
    if not makes or total % count or any(layer.out_features % total for layer in makes.values()):
        return None
    width = total // count
    return _made_of(name, module, kind, count, {c: (width,) * (x.out_features // total) for c, x in makes.items()}, output)


def _groups(name: str, module: Any) -> Units | None:
    """The key-value groups of transformers' attention: a head of k and v, with the heads of q that share it."""
    makes, width = _linears(module, GROUPED_INPUTS), module.head_dim
    queries = module.num_key_value_groups * width
    count = module.o_proj.in_features // queries
    rows = {c: {"qkv_proj": (queries, width, width), "q_proj": (queries,)}.get(c, (width,)) for c in makes}
    if set(makes) not in ({"qkv_proj"}, {"q_proj", "k_proj", "v_proj"}) or module.o_proj.in_features != count * queries:
        return None
    if any(makes[c].out_features != count * sum(heights) for c, heights in rows.items()):
        return None
    return _made_of(name, module, "groups", count, rows, "o_proj")


def _linears(module: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    return {name: linear(module, name) for name in names if isinstance(getattr(module, name, None), nn.Linear)}


def _made_of(name: str, module: nn.Module, kind: Kind, count: int, rows: dict[str, tuple[int, ...]], output: str) -> Units:
    reads = linear(module, output)
    width = reads.in_features // count
    weights = width * reads.out_features + sum(sum(heights) * linear(module, c).in_features for c, heights in rows.items())
    return Units(name, kind, count, width, {f"{name}.{c}": x for c, x in rows.items()}, f"{name}.{output}", weights)


def layer_roles(blocks: list[Block]) -> dict[str, str]:
    """The role of each layer that has units, by name: "attention", "gated MLP" or "plain MLP"."""
    roles: dict[str, str] = {}
    for units in [units for block in blocks for units in find_units(block.model, block.name)]:
        role = "attention" if units.kind != "neurons" else "gated MLP" if units.stacked == 2 else "plain MLP"
        roles |= dict.fromkeys((*units.inputs, units.output), role)
    return roles


def keep_units(model: nn.Module, units: Units, kept: Tensor) -> None:
    """Reduces a module in place to the units ``kept`` [n], in that order."""
    module: Any = model.get_submodule(units.module)
    columns = units.columns(kept)
    for name in units.inputs:
        layer, rows = linear(model, name), units.rows(name, kept)
        layer.weight = nn.Parameter(layer.weight[rows].clone(), requires_grad=False)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[rows].clone(), requires_grad=False)
        layer.out_features = len(rows)
    output = linear(model, units.output)
    output.weight = nn.Parameter(output.weight[:, columns].clone(), requires_grad=False)
    output.in_features = len(columns)
    if units.kind == "heads":
        module.num_heads = len(kept)
        for sizes in ("attn_dim", "kv_dim"):
            if hasattr(module, sizes):
                setattr(module, sizes, len(columns))
        if hasattr(module, "num_kv_heads"):
            module.num_kv_heads = len(kept)
    elif units.kind == "groups":
        module.config = grouped_config(module.config, len(kept), module)  # of this block alone
        for key in ("num_heads", "num_attention_heads", "num_key_value_heads"):
            if hasattr(module, key):
                setattr(module, key, getattr(module.config, key, module.config.num_attention_heads))
    setattr(module, KEPT, len(kept))


def grouped_config(config: Any, groups: int, attention: Any) -> Any:
    """A copy of a transformers configuration for as many key-value groups as those of an attention module."""
    config = copy.copy(config)
    config.num_attention_heads, config.num_key_value_heads = groups * attention.num_key_value_groups, groups
    config.head_dim = attention.head_dim  # else it would follow from the number of heads
    return config


def kept_units(model: nn.Module) -> dict[str, int]:
    """The number of remaining units in each reduced module, by name."""
    return {name: getattr(module, KEPT) for name, module in model.named_modules() if hasattr(module, KEPT)}


def resize(model: nn.Module, counts: dict[str, int]) -> None:
    """Reduces the modules of a full-size model to the numbers of units in a checkpoint, so that its state dict can be loaded.

    Raises:
        ValueError: a module has no units, or fewer than requested.
    """
    for name, count in counts.items():
        found = [units for units in find_units(model, name) if units.module == name]
        if not found or not 1 <= count <= found[0].count:
            raise ValueError(f"{name} cannot have {count} units")
        keep_units(model, found[0], torch.arange(count))


@torch.inference_mode()
def why_not(block: Block, units: Units, hidden: Tensor) -> str | None:
    """Checks on hidden states [b, *shape before the block] that removing every other unit is the same as zeroing it.

    Returns:
        the reason why units cannot be removed from this module; None if they can.
    """
    model, module = block.model, block.module
    kept = torch.arange(0, units.count, 2, device=hidden.device)
    silent = torch.ones(units.count * units.width, dtype=torch.bool, device=hidden.device)
    silent[units.columns(kept)] = False
    try:
        model.set_submodule(block.name, copy.deepcopy(module))
        linear(model, units.output).weight.data[:, silent] = 0
        silenced = block.run(hidden)
        model.set_submodule(block.name, copy.deepcopy(module))
        keep_units(model, units, kept)
        removed = block.run(hidden)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return f"it does not run with fewer {NAMES[units.kind]}: {' '.join(str(error).split())[:100]}"
    finally:
        model.set_submodule(block.name, module)
    difference = (removed - silenced).abs().max() / silenced.abs().max()
    return (
        None
        if difference <= TOLERANCE
        else f"removing {NAMES[units.kind]} is not silencing them: outputs differ by {difference:.1e}"
    )
