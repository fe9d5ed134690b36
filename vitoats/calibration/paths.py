"""The calibration images' two ways through a block whose layers are compressed one after another: compressed, and dense.

Where memory allows, little runs twice. The dense block runs once, and what its layers get is kept. On the compressed path the
outputs of modules whose layers are all compressed are kept from the pass in which they first ran, and replayed in the passes
for the layers behind them. Without that memory every pass starts at the block's input. What comes out is the same.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.common.memory import PageBuffers
from vitoats.models.adapter import LinearLayer, ModelAdapter
from vitoats.models.stream import StreamAddition, stream_additions

PROBES = 2  # images that show which layers add to the residual stream


class DensePath:
    """The way through the dense model.

    Attributes:
        hidden: before the current block, or behind it already where inputs are kept.
        additions: by layer name, the layers of the current block that add to the residual stream.
    """

    def __init__(self, hidden: HiddenStates, keep: bool):
        self.hidden = hidden
        self.additions: dict[str, StreamAddition] = {}
        self._keep = keep
        self._block: nn.Module  # a dense copy of the current block
        self._kept: list[dict[str, Tensor]] = []  # inputs of modules in it, by batch

    def enter(self, adapter: ModelAdapter, index: int, linears: list[LinearLayer], residual: bool) -> None:
        """Takes a copy of a block before it is compressed, and finds where its layers add to the residual stream."""
        self._block = copy.deepcopy(adapter.block(index))
        images = self.hidden.values[:PROBES].to(self.hidden.device)
        self.additions = stream_additions(adapter, index, linears, images) if residual else {}
        if not self._keep:
            return
        self._kept, apart = [], PageBuffers(self.hidden.n_batches)

        def keep(name: str, x: Tensor) -> None:
            self._kept[-1][name] = apart.copy(name, x)

        hooks = [self._block.register_forward_pre_hook(lambda _m, _a: self._kept.append({}))]
        for name in self._needed(adapter, index, linears):
            module = self._block.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(lambda _m, args, name=name: keep(name, args[0])))
        self._advance(adapter, index)
        for hook in hooks:
            hook.remove()

    def inputs(self, adapter: ModelAdapter, index: int, batch: int, names: list[str]) -> dict[str, Tensor]:
        """What modules of the current block get, by name in the block, for one batch."""
        if self._keep:
            return {name: self._kept[batch][name].to(self.hidden.device) for name in names}
        return _inputs(adapter, index, self._block, self.hidden.batch(batch), names)

    def keep_for(self, adapter: ModelAdapter, index: int, pending: list[LinearLayer]) -> None:
        """Frees what is kept for none of these layers."""
        needed = self._needed(adapter, index, pending)
        for kept in self._kept:
            for name in kept.keys() - needed:
                del kept[name]

    def _needed(self, adapter: ModelAdapter, index: int, linears: list[LinearLayer]) -> set[str]:
        """Modules of the current block whose inputs say what these layers get, and what they add to."""
        streams = {self.additions[x.name].stream for x in linears if x.name in self.additions}
        return streams | {adapter.name_in_block(index, x) for x in linears}

    def leave(self, adapter: ModelAdapter, index: int) -> None:
        """Moves on to the next block."""
        self._kept = []
        if not self._keep:
            self._advance(adapter, index)

    def _advance(self, adapter: ModelAdapter, index: int) -> None:
        self.hidden.advance(adapter, index, lambda _i, batch: adapter.run_block(index, batch, self._block))


class CompressedPath:
    """The way through the compressed model.

    Attributes:
        hidden: before the current block.
    """

    def __init__(self, hidden: HiddenStates, keep: bool):
        self.hidden = hidden
        self._keep = keep
        self._finished: list[str] = []  # modules in the current block that will not change any more
        self._outputs: list[dict[str, Tensor]] = []  # of such modules, by batch
        self._apart = PageBuffers(0)

    def finish(self, adapter: ModelAdapter, index: int, compressed: list[LinearLayer], pending: list[LinearLayer]) -> None:
        """Notes which modules of a block will not change any more: the outermost that hold compressed layers alone."""
        if not self._keep:
            return
        if not compressed:
            self._outputs = [{} for _ in range(self.hidden.n_batches)]
            self._apart = PageBuffers(self.hidden.n_batches)
        done, left = ([adapter.name_in_block(index, x) for x in layers] for layers in (compressed, pending))
        self._finished = []
        for name, _ in adapter.block(index).named_modules():
            holds_done, holds_left = (any(_inside(x, name) for x in layers) for layers in (done, left))
            if name and holds_done and not holds_left and not any(_inside(name, outer) for outer in self._finished):
                self._finished.append(name)

    def inputs(self, adapter: ModelAdapter, index: int, batch: int, names: list[str]) -> dict[str, Tensor]:
        """What modules of the current block get, by name in the block, for one batch."""
        with self._shortcuts(adapter.block(index), batch):
            return _inputs(adapter, index, adapter.block(index), self.hidden.batch(batch), names)

    def leave(self, adapter: ModelAdapter, index: int) -> None:
        """Moves on to the next block."""

        def run(i: int, hidden: Tensor) -> Tensor:
            with self._shortcuts(adapter.block(index), i):
                return adapter.run_block(index, hidden)

        self.hidden.advance(adapter, index, run)
        self._finished, self._outputs, self._apart = [], [], PageBuffers(0)

    @contextmanager
    def _shortcuts(self, block: nn.Module, batch: int) -> Iterator[None]:
        """Within it, finished modules answer with what they put out before; those that have not run yet are noted."""
        outputs = self._outputs[batch] if self._finished else {}
        calls: dict[str, list[Tensor]] = {name: [] for name in self._finished if name not in outputs}

        def keep(name: str, out: Tensor) -> None:
            calls[name].append(self._apart.copy(name, out))

        hooks = [
            block.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: keep(name, out)) for name in calls
        ]
        replayed = [block.get_submodule(name) for name in outputs]
        for name, module in zip(outputs, replayed, strict=True):
            module.forward = lambda *_, name=name, **__: outputs[name].to(self.hidden.device, copy=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in replayed:
                del module.forward
        new = {name: found[0] for name, found in calls.items() if len(found) == 1}  # what runs more than once is not replayed
        for name in [x for x in outputs if any(_inside(x, outer) for outer in new)]:
            del outputs[name]
        outputs.update(new)


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


class _AllReachedError(Exception):
    """Ends a block's forward pass once all that was asked for is known."""


@torch.inference_mode()
def _inputs(adapter: ModelAdapter, index: int, block: nn.Module, hidden: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Runs a block until the modules ``names`` in it have been called; returns their inputs."""
    caught: dict[str, Tensor] = {}

    def catch(name: str, x: Tensor) -> None:
        caught[name] = x
        if len(caught) == len(names):
            raise _AllReachedError

    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: catch(name, args[0])) for name in names
    ]
    call = adapter.calls[index]
    try:
        block(hidden, *call.args, **call.kwargs)
    except _AllReachedError:
        return caught
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"{adapter.block_names[index]} did not call all of {names}")
