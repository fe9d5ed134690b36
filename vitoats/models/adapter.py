"""Finds the blocks of a vision transformer and the linear layers in them, by structure and not by name.

The blocks are ``model.blocks``. One probing forward pass finds out what no attribute says: that each block's output really is
the next one's input, which linear layers are called as modules (only those can be replaced), and what else the blocks get
besides the hidden state (a rotary embedding, say). A model that does not fit is refused with the reason.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.errors import InputError

FUSED_PARTS = {"qkv": 3}  # layers whose rows stack several matrices of equal height, by the last part of their name


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer that can be compressed.

    Attributes:
        name: dotted name in the model.
        parts: how many matrices of equal height its rows stack, 3 for a fused qkv.
    """

    name: str
    parts: int


@dataclass
class BlockCall:
    """What a block is called with besides the hidden state."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelAdapter:
    """A model seen as a chain of blocks.

    Attributes:
        model: the whole model.
        block_names: dotted name of each block, in order.
        linears: the compressible linear layers of each block, in order of their first call.
        calls: what each block is called with besides the hidden state.
        skipped: (name, reason) of every other layer with a weight matrix.
        hidden_shape: tokens and width of the hidden state between blocks, for one image.
    """

    model: nn.Module
    block_names: list[str]
    linears: list[list[LinearLayer]]
    calls: list[BlockCall]
    skipped: list[tuple[str, str]]
    hidden_shape: tuple[int, ...]

    def block(self, index: int) -> nn.Module:
        """The block as it is now, compressed or not."""
        return self.model.get_submodule(self.block_names[index])

    def linear(self, layer: LinearLayer) -> nn.Linear:
        """The module of a layer that is not compressed yet."""
        module = self.model.get_submodule(layer.name)
        assert isinstance(module, nn.Linear)
        return module

    def run_block(self, index: int, hidden: Tensor, block: nn.Module | None = None) -> Tensor:
        """One block, or another module in its place, on hidden states [batch, *hidden_shape]."""
        call = self.calls[index]
        return (block or self.block(index))(hidden, *call.args, **call.kwargs)

    @torch.inference_mode()
    def first_hidden(self, images: Tensor) -> Tensor:
        """The input of the first block, for images [batch, 3, h, w]; the blocks are not run."""
        caught: list[Tensor] = []

        def stop(_module, args, kwargs):
            caught.append(args[0] if args else kwargs["x"])
            raise _FirstBlockReachedError

        handle = self.block(0).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(images)
        except _FirstBlockReachedError:
            return caught[0]
        finally:
            handle.remove()
        raise AssertionError("the model did not call its first block")


class _FirstBlockReachedError(Exception):
    """Ends a forward pass once the first block's input is known."""


@torch.inference_mode()
def adapt(model: nn.Module, img_size: int) -> ModelAdapter:
    """Makes the adapter of a model.

    Args:
        model: an image model in eval mode with a ``blocks`` list.
        img_size: height and width of its images in pixels.

    Raises:
        InputError: the model has no chain of blocks, with the reason.
    """
    kind = type(model).__name__
    found = [
        n
        for n, m in model.named_modules()
        if n.rpartition(".")[2] == "blocks" and isinstance(m, (nn.Sequential, nn.ModuleList))
    ]
    if len(found) != 1:
        reason = "has no list named 'blocks'" if not found else f"has {len(found)} lists of blocks"
        raise InputError(f"{kind} {reason}, so its blocks cannot be compressed one after the other: use a ViT-like model")
    block_names = [f"{found[0]}.{name}" for name, _ in model.get_submodule(found[0]).named_children()]

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, img_size, img_size, generator=generator).to(device)
    probe = _probe(model, block_names, images)
    again = _probe(model, block_names, images[:1] * 0.5)
    for name, call, other in zip(block_names, probe.calls, again.calls, strict=True):
        if not _same(call, other):
            raise InputError(
                f"{kind} passes something to {name} that depends on the image, "
                f"which calibration by blocks cannot keep: use a ViT-like model"
            )
    for i in range(1, len(block_names)):
        if not _same(probe.outputs[i - 1], probe.inputs[i]):
            raise InputError(
                f"in {kind} the output of {block_names[i - 1]} is not the input of {block_names[i]}: use a ViT-like model"
            )

    linears: list[list[LinearLayer]] = []
    skipped: list[tuple[str, str]] = []
    inside: set[str] = set()
    for block_name in block_names:
        rows = []
        for name, module in model.get_submodule(block_name).named_modules(prefix=block_name):
            inside.add(name)
            if not isinstance(module, nn.Linear):
                continue
            if name not in probe.called:
                skipped.append((name, "its weight is used directly, not by calling the layer"))
                continue
            parts = FUSED_PARTS.get(name.rpartition(".")[2], 1)
            rows.append(LinearLayer(name, parts if module.out_features % parts == 0 else 1))
        linears.append(sorted(rows, key=lambda linear: probe.called.index(linear.name)))
    if not any(linears):
        raise InputError(f"the blocks of {kind} have no linear layers that are called: use a ViT-like model")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in inside:
            skipped.append((name, "outside the blocks"))
        elif isinstance(module, nn.Conv2d):
            skipped.append((name, "a convolution"))
    return ModelAdapter(model, block_names, linears, probe.calls, skipped, tuple(probe.inputs[0].shape[1:]))


@dataclass
class _Probe:
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    calls: list[BlockCall] = field(default_factory=list)
    called: list[str] = field(default_factory=list)


def _probe(model: nn.Module, block_names: list[str], images: Tensor) -> _Probe:
    """Runs the model once and notes what its blocks and linear layers do."""
    probe = _Probe()

    def before(_module, args, kwargs):
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("x", None)
        if not isinstance(hidden, Tensor) or hidden.shape[0] != images.shape[0]:
            raise InputError(f"the blocks of {type(model).__name__} take no batch of hidden states first: use a ViT-like model")
        probe.inputs.append(hidden.clone())
        probe.calls.append(BlockCall(args[1:], kwargs))

    def after(_module, _args, output):
        if not isinstance(output, Tensor):
            raise InputError(f"the blocks of {type(model).__name__} return more than hidden states: use a ViT-like model")
        probe.outputs.append(output.clone())

    handles = []
    for name in block_names:
        block = model.get_submodule(name)
        handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(lambda *_, name=name: probe.called.append(name)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if len(probe.inputs) != len(block_names):
        raise InputError(
            f"{type(model).__name__} runs {len(probe.inputs)} of its {len(block_names)} blocks in a forward pass: "
            f"use a ViT-like model"
        )
    return probe


def _same(a: Any, b: Any) -> bool:
    """Whether two blocks' extra arguments are equal, tensors included."""
    if isinstance(a, BlockCall):
        return _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or a == b
