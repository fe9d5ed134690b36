"""Which layers of a block add to the residual stream, found by structure and not by name."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitoats.models.adapter import LinearLayer, ModelAdapter

EXACT = 1e-6  # a sum of a stream and a scaled output is recognised to this relative error, in float64


@dataclass(frozen=True)
class StreamAddition:
    """A layer's output is scaled by gamma and added to the residual stream.

    Attributes:
        stream: name in the block of the module whose input is the stream before the addition; "" for the block itself.
        gamma: [d_out].
    """

    stream: str
    gamma: Tensor


def stream_additions(
    adapter: ModelAdapter, index: int, linears: list[LinearLayer], hidden: Tensor
) -> dict[str, StreamAddition]:
    """Finds the layers of a block whose output, scaled channel by channel, is added to the residual stream.

    The block runs in float64, and a layer's output o qualifies if the difference of two tensors of the hidden states' shape,
    inputs of modules in the block or the block's output, is gamma o.

    Args:
        adapter: the model.
        index: which block, still dense.
        linears: its linear layers.
        hidden: a few hidden states before it.
    """
    block = copy.deepcopy(adapter.block(index)).double()
    hidden = hidden.double()
    streams: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def before(name: str, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == hidden.shape:
            streams[name] = args[0].clone()

    handles = []
    for name, module in block.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: before(name, args)))
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(lambda _m, _a, out, name=name: outputs.update({name: out.clone()})))
    with torch.inference_mode():
        call = adapter.calls[index]
        result = block(hidden, *call.args, **call.kwargs)
    for handle in handles:
        handle.remove()

    found: dict[str, StreamAddition] = {}
    for linear in linears:
        o = outputs[adapter.name_in_block(index, linear)]
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
