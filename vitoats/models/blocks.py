"""A model as a chain of blocks."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.models.hooks import answer_for, inputs_of
from vitoats.models.inputs import ImageInputs


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer that can be compressed.

    Attributes:
        model: the whole model.
        name: the layer's dotted name in the model.
        parts: number of matrices of equal height that its rows stack; 3 for a fused qkv.
    """

    model: nn.Module = field(repr=False)
    name: str
    parts: int

    @property
    def module(self) -> nn.Linear:
        """The dense layer; fails once the layer is compressed."""
        module = self.model.get_submodule(self.name)
        assert isinstance(module, nn.Linear)
        return module


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block besides the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


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
        return (module or self.module)(hidden, *self.call.args, **self.call.kwargs)

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
    inputs: ImageInputs
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
            return self.inputs.features(self.model, self.inputs.zeros(len(hidden)).to(hidden.device))
