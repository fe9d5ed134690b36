"""The two paths of the calibration images through a block whose layers are compressed one after another: compressed and dense.

If memory allows, little is computed twice. The dense block runs once, and its layers' inputs are kept. On the compressed path,
the outputs of modules whose layers are all compressed are kept from the first pass after that, and replayed in the passes for
the layers behind them. Without enough memory, every pass starts at the block's input. The results are the same.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.common.memory import PageBuffers
from vitoats.models.blocks import Block, LinearLayer
from vitoats.models.hooks import answer_for, inputs_of, watch_inputs, watch_outputs
from vitoats.models.stream import StreamAddition, stream_additions

PROBES = 2  # images used to find the layers that add to the residual stream


class DensePath:
    """The path through the dense model.

    Attributes:
        hidden: the hidden states before the current block, or already behind it if inputs are kept.
        additions: where layers of the current block add to the residual stream, by layer name.
    """

    def __init__(self, hidden: HiddenStates, keep: bool):
        self.hidden = hidden
        self.additions: dict[str, StreamAddition] = {}
        self._keep = keep
        self._block: Block  # the current one
        self._module: nn.Module  # a dense copy of it
        self._kept: list[dict[str, Tensor]] = []  # inputs of its modules, by batch

    def enter(self, block: Block, linears: list[LinearLayer], residual: bool) -> None:
        """Copies a block before it is compressed, and finds where its layers add to the residual stream.

        Args:
            block: the next one, still dense.
            linears: the layers whose inputs will be needed.
            residual: whether the residual streams they add to will be needed, too.
        """
        self._block, self._module = block, copy.deepcopy(block.module)
        self.additions = stream_additions(block, linears, self.hidden.of_images(count=PROBES)) if residual else {}
        if not self._keep:
            return
        self._kept, buffers = [], PageBuffers(self.hidden.n_batches, self.hidden.values.device)

        def keep(name: str, x: Tensor) -> None:
            self._kept[-1][name] = buffers.copy(name, x)

        def run(_i: int, hidden: Tensor) -> Tensor:
            self._kept.append({})
            return self.hidden.run(block, hidden, self._module)

        with watch_inputs({name: self._module.get_submodule(name) for name in self._needed(linears)}, keep):
            self.hidden.advance(block, run)

    def inputs(self, batch: int, names: list[str]) -> dict[str, Tensor]:
        """Inputs of modules of the current block for one batch, by name within the block."""
        if self._keep:
            return {name: self._kept[batch][name].to(self.hidden.device) for name in names}
        return _inputs(self.hidden, self._block, self._module, batch, names)

    def keep_for(self, pending: list[LinearLayer]) -> None:
        """Frees kept inputs that none of these layers needs."""
        needed = self._needed(pending)
        for kept in self._kept:
            for name in kept.keys() - needed:
                del kept[name]

    def _needed(self, linears: list[LinearLayer]) -> set[str]:
        """Modules of the current block whose inputs are those of these layers, or the residual streams they add to."""
        streams = {self.additions[x.name].stream for x in linears if x.name in self.additions}
        return streams | {self._block.name_inside(x) for x in linears}

    def advance(self, block: Block) -> None:
        """Moves on to the next block."""
        self._kept = []
        if not self._keep:
            self.hidden.advance(block, lambda _i, hidden: self.hidden.run(block, hidden, self._module))


class CompressedPath:
    """The path through the compressed model.

    Attributes:
        hidden: the hidden states before the current block.
    """

    def __init__(self, hidden: HiddenStates, keep: bool):
        self.hidden = hidden
        self._keep = keep
        self._block: Block  # the current one
        self._compressed: list[str] = []  # its compressed layers, by name within it
        self._pending: list[str] = []
        self._finished: list[str] = []  # its modules that will not change any more
        self._outputs: list[dict[str, _Output]] = []  # outputs of these modules, by batch
        self._buffers = PageBuffers(0, hidden.values.device)

    def enter(self, block: Block, linears: list[LinearLayer]) -> None:
        """Enters the next block, whose layers ``linears`` will be compressed."""
        self._block = block
        self._compressed, self._pending, self._finished = [], [block.name_inside(x) for x in linears], []
        self._outputs = [{} for _ in range(self.hidden.n_batches)]
        self._buffers = PageBuffers(self.hidden.n_batches, self.hidden.values.device)

    def finish(self, layer: LinearLayer) -> None:
        """Called once a layer is compressed. The outermost modules with only compressed layers will not change any more."""
        if not self._keep:
            return
        name = self._block.name_inside(layer)
        self._pending.remove(name)
        self._compressed.append(name)
        self._finished = []
        for name, _ in self._block.module.named_modules():
            done, left = (any(_inside(x, name) for x in layers) for layers in (self._compressed, self._pending))
            if name and done and not left and not any(_inside(name, outer) for outer in self._finished):
                self._finished.append(name)

    def inputs(self, batch: int, names: list[str]) -> dict[str, Tensor]:
        """Inputs of modules of the current block for one batch, by name within the block."""
        with self._shortcuts(batch):
            return _inputs(self.hidden, self._block, self._block.module, batch, names)

    def advance(self, block: Block) -> None:
        """Moves on to the next block."""

        def run(i: int, hidden: Tensor) -> Tensor:
            with self._shortcuts(i):
                return self.hidden.run(block, hidden)

        self.hidden.advance(block, run)
        self._finished, self._outputs, self._buffers = [], [], PageBuffers(0, self.hidden.values.device)

    @contextmanager
    def _shortcuts(self, batch: int) -> Iterator[None]:
        """In this context, finished modules replay their kept outputs; those without any run, and their outputs are kept."""
        module = self._block.module
        outputs = self._outputs[batch] if self._finished else {}
        calls: dict[str, list[_Output | None]] = {name: [] for name in self._finished if name not in outputs}
        with (
            answer_for((module.get_submodule(name), partial(self._replay, output)) for name, output in outputs.items()),
            watch_outputs(
                {name: module.get_submodule(name) for name in calls},
                lambda name, _x, out: calls[name].append(_Output.of(name, out, self._buffers)),
            ),
        ):
            yield
        new = {name: found[0] for name, found in calls.items() if len(found) == 1 and found[0]}  # called once, and kept
        for name in [x for x in outputs if any(_inside(x, outer) for outer in new)]:
            del outputs[name]
        outputs.update(new)

    def _replay(self, output: "_Output") -> Any:
        first = output.first.to(self.hidden.device, copy=True)
        return first if output.nones is None else (first, *output.nones)


@dataclass(frozen=True)
class _Output:
    """A module's output: a tensor, or a tuple of a tensor and ``nones``, as of transformers' attention without its weights."""

    first: Tensor
    nones: tuple[None, ...] | None

    @classmethod
    def of(cls, name: str, output: Any, buffers: PageBuffers) -> "_Output | None":
        """A copy of the output of the module ``name``; None if it has another form, or holds more tensors."""
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) and output else (output, None)
        if not isinstance(first, Tensor) or any(x is not None for x in rest or ()):
            return None
        return cls(buffers.copy(name, first), rest)


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


@torch.inference_mode()
def _inputs(hidden: HiddenStates, block: Block, module: nn.Module, batch: int, names: list[str]) -> dict[str, Tensor]:
    """Runs a block, or a copy of it, until the modules ``names`` in it have been called; returns their inputs."""
    states = hidden.batch(batch)
    return inputs_of({name: module.get_submodule(name) for name in names}, lambda: hidden.run(block, states, module))
