"""A model as a chain of blocks."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.models.hooks import answer_for, inputs_of
from vitoats.models.inputs import ImageInputs, ModelInputs


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer that can be compressed.

    Attributes:
        model: the whole model.
        name: the layer's dotted name in the model.
        parts: number of matrices that its rows stack; 3 for a fused qkv.
        unequal: the heights of these matrices, if they differ, as with grouped queries.
    """

    model: nn.Module = field(repr=False)
    name: str
    parts: int
    unequal: tuple[int, ...] | None = None

    @property
    def module(self) -> nn.Linear:
        """The dense layer; fails once the layer is compressed."""
        module = self.model.get_submodule(self.name)
        assert isinstance(module, nn.Linear)
        return module

    @property
    def heights(self) -> tuple[int, ...]:
        """The heights of the matrices that its rows stack."""
        return self.unequal or (self.module.out_features // self.parts,) * self.parts

    def whole(self) -> "LinearLayer":
        """The same layer, taken as one matrix."""
        return LinearLayer(self.model, self.name, 1)


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block besides the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "BlockCall":
        """The same call with floating-point tensors of another type."""
        return BlockCall(_to(self.args, dtype), _to(self.kwargs, dtype))


@dataclass(frozen=True)
class Block:
    """One block of the chain, or a module that runs between two of them.

    Attributes:
        model: the whole model.
        name: the block's dotted name in the model.
        linears: its compressible linear layers, or those selected for compression, in order of their first call.
        call: its arguments besides the hidden states.
        shape_before: shape of one image's hidden states before the block, such as (tokens, width).
        shape_after: shape of one image's hidden states after the block.
    """

    model: nn.Module = field(repr=False)
    name: str
    linears: list[LinearLayer]
    call: BlockCall = field(repr=False)
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]

    @property
    def module(self) -> nn.Module:
        """The block in its current state, compressed or not."""
        return self.model.get_submodule(self.name)

    def run(self, hidden: Tensor, module: nn.Module | None = None) -> Tensor:
        """Runs the block, or another module instead of it: [b, *shape_before] to [b, *shape_after]."""
        outputs = (module or self.module)(hidden, *self.call.args, **self.call.kwargs)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def name_inside(self, layer: LinearLayer) -> str:
        """A layer's name relative to the block."""
        return layer.name[len(self.name) + 1 :]


@dataclass(frozen=True)
class ModelAdapter:
    """A model as a chain of blocks.

    Attributes:
        model: the whole model.
        inputs: the model's inputs.
        blocks: the blocks in the order in which they run; the output of each is the input of the next.
        skipped: (name, reason) of every layer with a weight matrix that cannot be compressed.
    """

    model: nn.Module = field(repr=False)
    inputs: ModelInputs
    blocks: list[Block]
    skipped: list[tuple[str, str]]

    @property
    def linears(self) -> list[LinearLayer]:
        """The compressible linear layers of all blocks."""
        return [layer for block in self.blocks for layer in block.linears]

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def first_hidden(self, batch: Tensor) -> Tensor:
        """The hidden states [b, *shape_before] before the first block for a batch of inputs; the blocks do not run."""
        first = self.blocks[0]
        return inputs_of({first.name: first.module}, lambda: self.inputs.call(self.model, batch))[first.name]

    @torch.inference_mode()
    def features_of(self, hidden: Tensor) -> Tensor:
        """The features [b, d] (``ImageInputs.features``) of hidden states [b, *shape_after] behind the last block.

        The model runs on blank images, and the blocks do not run, so that everything behind them is as the model has it.
        """
        *others, last = self.blocks
        answers = [(block.module, partial(hidden.new_zeros, len(hidden), *block.shape_after)) for block in others]
        with answer_for([*answers, (last.module, lambda: hidden)]):
            assert isinstance(self.inputs, ImageInputs)
            return self.inputs.features(self.model, self.inputs.zeros(len(hidden)).to(hidden.device))


def same(a: Any, b: Any) -> bool:
    """Whether two values, such as the calls of two blocks, are equal, including tensors in them."""
    if isinstance(a, BlockCall):
        return same(a.args, b.args) and same(a.kwargs, b.kwargs)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a is b or a == b


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_to(item, dtype) for item in value)
    return {key: _to(item, dtype) for key, item in value.items()} if type(value) is dict else value
