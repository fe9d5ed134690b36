"""Finds the layers of a block that add to the residual stream, by structure rather than by name."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.models.blocks import Block, LinearLayer
from vitoats.models.hooks import watch_inputs, watch_outputs

EXACT = 1e-6  # largest relative error at which an addition to the stream is recognised, in float64


@dataclass(frozen=True)
class StreamAddition:
    """A layer whose output, scaled by gamma, is added to the residual stream.

    Attributes:
        stream: the module, by its name in the block, whose input is the stream before the addition; "" for the block itself.
        gamma: [d_out].
    """

    stream: str
    gamma: Tensor


@torch.inference_mode()
def stream_additions(block: Block, linears: list[LinearLayer], hidden: Tensor) -> dict[str, StreamAddition]:
    """Finds the layers of a block whose output, scaled per channel, is added to the residual stream.

    The block runs in float64. Candidates for the stream are the inputs of modules in the block and the block's output, if they
    have the shape of the hidden states. A layer with output o qualifies if two of them differ by gamma o.

    Args:
        block: the block, still dense.
        linears: its linear layers.
        hidden: a few hidden states before the block.
    """
    module = copy.deepcopy(block.module).double()
    hidden, block = hidden.double(), replace(block, call=block.call.to(torch.float64))
    inside = dict(module.named_modules())
    streams: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note_stream(name: str, x: Any) -> None:
        if isinstance(x, Tensor) and x.shape == hidden.shape:
            streams[name] = x.clone()

    def note_output(name: str, _x: Tensor, output: Tensor) -> None:
        outputs[name] = output.clone()

    with (
        watch_inputs(inside, note_stream),
        watch_outputs({name: m for name, m in inside.items() if isinstance(m, nn.Linear)}, note_output),
    ):
        result = block.run(hidden, module)

    found: dict[str, StreamAddition] = {}
    for linear in linears:
        o = outputs[block.name_inside(linear)]
        if o.shape != hidden.shape:
            continue
        tokens = tuple(range(o.ndim - 1))
        for name, stream in streams.items():
            for later in [*streams.values(), *([result] if result.shape == hidden.shape else [])]:
                added = later - stream
                gamma = ((added * o).sum(dim=tokens) / o.square().sum(dim=tokens)).nan_to_num(0.0)
                if added.norm() > 0 and (added - gamma * o).norm() <= EXACT * added.norm():
                    found.setdefault(linear.name, StreamAddition(name, gamma.float()))
    return found
