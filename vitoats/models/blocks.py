"""A model seen as a chain of blocks."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.models.hooks import inputs_of
from vitoats.models.inputs import ImageInputs


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer that can be compressed.

    Attributes:
        model: the whole model.
        name: dotted name in it.
        parts: how many matrices of equal height its rows stack, 3 for a fused qkv.
    """

    model: nn.Module = field(repr=False)
    name: str
    parts: int

    @property
    def module(self) -> nn.Linear:
        """The layer, as long as it is not compressed."""
        module = self.model.get_submodule(self.name)
        assert isinstance(module, nn.Linear)
        return module


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """One block of the chain, or a module that runs between two of them.

    Attributes:
        model: the whole model.
        name: dotted name in it.
        linears: its compressible linear layers, or those of them that are to be compressed, in order of their first call.
        call: what it is called with besides the hidden states.
        shape_before: of the hidden states that one image has before it, such as (tokens, width).
        shape_after: and after it.
    """

    model: nn.Module = field(repr=False)
    name: str
    linears: list[LinearLayer]
    call: BlockCall = field(repr=False)
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]

    @property
    def module(self) -> nn.Module:
        """The block as it is now, compressed or not."""
        return self.model.get_submodule(self.name)

    def run(self, hidden: Tensor, module: nn.Module | None = None) -> Tensor:
        """Runs the block, or another module in its place: [b, *shape_before] to [b, *shape_after]."""
        return (module or self.module)(hidden, *self.call.args, **self.call.kwargs)

    def name_inside(self, layer: LinearLayer) -> str:
        """A layer's name, seen from the block."""
        return layer.name[len(self.name) + 1 :]


@dataclass(frozen=True)
class ModelAdapter:
    """A model seen as a chain of blocks.

    Attributes:
        model: the whole model.
        inputs: what it takes.
        blocks: in the order in which they run, each one's output being the next one's input.
        skipped: (name, reason) of every other layer with a weight matrix.
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
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def first_hidden(self, batch: Tensor) -> Tensor:
        """The hidden states [b, *shape_before] before the first block, for a batch of inputs; the blocks are not run."""
        first = self.blocks[0]
        return inputs_of({first.name: first.module}, lambda: self.inputs.call(self.model, batch))[first.name]
