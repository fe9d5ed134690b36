"""Attention heads and MLP neurons as removable units: locating their weights, and removing some of them from a module.

A unit consists of a slice of rows in the matrices that produce it, and a slice of columns in the matrix that reads it:

    head h      rows of q, k and v (each third of a fused qkv, biases included; also of a gate)   columns of proj
    neuron i    row of fc1 (of both halves, gate and up, if fc1 is a packed SwiGLU)               column of fc2

Units are found by the attributes of timm's attention and MLP classes, and of transformers' MLPs. ``why_not`` checks on hidden
states that a block without some units computes the same as with these units zeroed. A norm across units, or parameters with one
entry per head, fail there.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitoats.models.blocks import Block

ATTENTION_INPUTS = ("qkv", "q_proj", "k_proj", "v_proj", "gate")
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
        width: columns of the output layer per unit: the head's width, or 1.
        inputs: names of the linear layers whose rows produce the units; each stacks matrices of count * width rows.
        output: name of the linear layer whose columns read the units.
        weights: elements of all weight matrices per unit, without biases.
        stacked: total number of matrices of count * width rows in the inputs: 3 for q, k and v, 1 for a plain MLP, 2 for a
            gated one.
    """

    module: str
    kind: Literal["heads", "neurons"]
    count: int
    width: int
    inputs: tuple[str, ...]
    output: str
    weights: int
    stacked: int

    def columns(self, units: Tensor) -> Tensor:
        """Indices [n * width] of the output layer's columns that belong to the units [n]."""
        return (units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()


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
        for inputs, output in MLPS:
            if isinstance(getattr(module, output, None), nn.Linear):
                found.append(_units(name, module, "neurons", linear(module, output).in_features, inputs, output))
    return [units for units in found if units is not None]


def _units(
    name: str, module: nn.Module, kind: Literal["heads", "neurons"], count: int, candidates: tuple[str, ...], output: str
) -> Units | None:
    """The units of a module; None if the sizes of its layers do not match."""
    reads = linear(module, output)
    makes = {f"{name}.{c}": linear(module, c) for c in candidates if isinstance(getattr(module, c, None), nn.Linear)}
    total = reads.in_features
    if not makes or total % count or any(layer.out_features % total for layer in makes.values()):
        return None
    width = total // count
    stacked = sum(layer.out_features // total for layer in makes.values())
    weights = width * (reads.out_features + sum(layer.weight.numel() // total for layer in makes.values()))
    return Units(name, kind, count, width, tuple(makes), f"{name}.{output}", weights, stacked)


def layer_roles(blocks: list[Block]) -> dict[str, str]:
    """The role of each layer that has units, by name: "attention", "gated MLP" or "plain MLP"."""
    roles: dict[str, str] = {}
    for units in [units for block in blocks for units in find_units(block.model, block.name)]:
        role = "attention" if units.kind == "heads" else "gated MLP" if units.stacked == 2 else "plain MLP"
        roles |= dict.fromkeys((*units.inputs, units.output), role)
    return roles


def keep_units(model: nn.Module, units: Units, kept: Tensor) -> None:
    """Reduces a module in place to the units ``kept`` [n], in that order."""
    module = model.get_submodule(units.module)
    columns = units.columns(kept)
    for name in units.inputs:
        layer = linear(model, name)
        total = units.count * units.width
        rows = torch.cat([columns + start for start in range(0, layer.out_features, total)])
        layer.weight = nn.Parameter(layer.weight[rows].clone(), requires_grad=False)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[rows].clone(), requires_grad=False)
        layer.out_features = len(rows)
    output = linear(model, units.output)
    output.weight = nn.Parameter(output.weight[:, columns].clone(), requires_grad=False)
    output.in_features = len(columns)
    if units.kind == "heads":
        module.num_heads = len(kept)  # type: ignore[assignment]
        for sizes in ("attn_dim", "kv_dim"):
            if hasattr(module, sizes):
                setattr(module, sizes, len(columns))
        if hasattr(module, "num_kv_heads"):
            module.num_kv_heads = len(kept)  # type: ignore[assignment]
    setattr(module, KEPT, len(kept))


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
        return f"it does not run with fewer {units.kind}: {' '.join(str(error).split())[:100]}"
    finally:
        model.set_submodule(block.name, module)
    difference = (removed - silenced).abs().max() / silenced.abs().max()
    return (
        None if difference <= TOLERANCE else f"removing {units.kind} is not silencing them: outputs differ by {difference:.1e}"
    )
