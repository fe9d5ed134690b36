"""Calibration activations, block after block: what each linear layer sees, with the already compressed blocks before it.

The hidden states of all calibration images between two blocks are one tensor [n, tokens, width], updated in place. Each block
runs over it twice: once as it was, to measure the inputs of its linear layers, and once compressed, to move on. Memory does
not grow with depth (vitoats.compression.estimates).
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitoats.common.errors import InputError, RunError
from vitoats.methods.statistics import InputStatistics, StatisticsLevel
from vitoats.models.adapter import LinearLayer, ModelAdapter
from vitoats.models.units import find_units

MIRRORED = 1024  # inputs from which on half of a second moment is copied from the other half


class HiddenStates:
    """The hidden states of the calibration images before the current block, [n, *its hidden shape], float32."""

    def __init__(self, values: Tensor, batch_size: int, device: torch.device, spill_to: Path | None):
        self.values = values
        self.batch_size = batch_size
        self.device = device
        self.spill_to = spill_to

    @classmethod
    def collect(
        cls,
        adapter: ModelAdapter,
        images: Iterator[Tensor],
        nsamples: int,
        batch_size: int,
        spill_to: Path | None = None,
    ) -> "HiddenStates":
        """Runs the images up to the first block.

        Args:
            adapter: the model.
            images: batches [b, 3, h, w], ``nsamples`` images in all at most.
            nsamples: how many images there may be.
            batch_size: how many images a block runs on at a time.
            spill_to: keep the hidden states in a file in this folder, mapped to memory, and not in memory.

        Raises:
            RunError: there is no room for the file.
        """
        values = _allocate((nsamples, *adapter.hidden_shapes[0]), spill_to)
        device = next(adapter.model.parameters()).device
        count = 0
        for batch in images:
            hidden = adapter.first_hidden(batch.to(device))
            values[count : count + len(batch)] = hidden.to("cpu", torch.float32)
            count += len(batch)
        return cls(values[:count], batch_size, device, spill_to)

    def copy(self, spill_to: Path | None = None) -> "HiddenStates":
        """The same once more, in memory or in a file in ``spill_to``."""
        values = _allocate(tuple(self.values.shape), spill_to).copy_(self.values)
        return HiddenStates(values, self.batch_size, self.device, spill_to)

    @property
    def n_images(self) -> int:
        return len(self.values)

    @torch.inference_mode()
    def statistics(
        self, adapter: ModelAdapter, block: int, linears: list[LinearLayer], needs: StatisticsLevel = "diagonal"
    ) -> dict[str, InputStatistics]:
        """Runs a block over all images and measures the input of each linear layer.

        Sums over one batch are float32, sums of batches float64. A fused qkv is one layer, so q, k and v share one H.

        Args:
            adapter: the model.
            block: which block.
            linears: its linear layers.
            needs: "diagonal" for the second moment of each input alone, "neurons" for those of an MLP's hidden neurons too,
                "full" for H and the mean as well.

        Returns:
            moments by layer name, on the CPU.

        Raises:
            InputError: an activation is not finite.
        """
        sums: dict[str, list[Tensor]] = {}
        tokens: dict[str, int] = {}

        def measure(name: str, x: Tensor) -> None:
            x = x.reshape(-1, x.shape[-1]).float()
            new = [x.square().sum(dim=0)] if needs != "full" else [gram(x), x.sum(dim=0)]
            if name in sums:
                for total, part in zip(sums[name], new, strict=True):
                    total += part
            else:
                sums[name] = [part.double() for part in new]
            tokens[name] = tokens.get(name, 0) + len(x)

        handles = [
            adapter.linear(linear).register_forward_pre_hook(lambda _m, args, name=linear.name: measure(name, args[0]))
            for linear in linears
        ]
        try:
            for batch in self.values.split(self.batch_size):
                adapter.run_block(block, batch.to(self.device))
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for name, totals in sums.items():
            moments = [total.div_(tokens[name]).cpu() for total in totals]
            if not all(torch.isfinite(moment).all() for moment in moments):
                raise InputError(
                    f"activations at {name} are not finite (NaN or Inf): check the weights and the calibration images"
                )
            found[name] = input_moments(*moments) if needs == "full" else InputStatistics(moments[0])
        return _with_neurons(adapter, block, found) if needs == "neurons" else found

    @property
    def n_batches(self) -> int:
        return -(-len(self.values) // self.batch_size)

    def batch(self, i: int) -> Tensor:
        """The hidden states of one batch, on the device."""
        return self.values[i * self.batch_size : (i + 1) * self.batch_size].to(self.device)

    @torch.inference_mode()
    def advance(self, adapter: ModelAdapter, index: int, run: Callable[[int, Tensor], Tensor] | None = None) -> None:
        """Replaces the hidden states by a block's outputs: in place, or in a new store where their shape is another.

        Args:
            adapter: the model.
            index: which block.
            run: another way from a batch, given with its number, to the block's outputs.
        """
        run = run or (lambda _i, batch: adapter.run_block(index, batch))
        before, shape = self.values, adapter.hidden_shapes[index + 1]
        if before.shape[1:] != shape:
            self.values = _allocate((len(before), *shape), self.spill_to)
        batches = zip(before.split(self.batch_size), self.values.split(self.batch_size), strict=True)
        for i, (batch, outputs) in enumerate(batches):
            outputs.copy_(run(i, batch.to(self.device)))


def gram(x: Tensor) -> Tensor:
    """x^T x [k, k] for x [n, k]: the blocks above the diagonal are computed, those below it copied."""
    if x.shape[1] < MIRRORED:
        return x.T @ x
    G = x.new_zeros(x.shape[1], x.shape[1])
    for i in range(0, x.shape[1], MIRRORED // 2):
        G[i : i + MIRRORED // 2, i:] = x[:, i : i + MIRRORED // 2].T @ x[:, i:]
    return G.triu() + G.triu(1).T


def input_moments(H: Tensor, mean: Tensor) -> InputStatistics:
    """Statistics from H [d_in, d_in] and the mean [d_in]."""
    return InputStatistics(H.diagonal().clone(), H, mean)


def _with_neurons(adapter: ModelAdapter, block: int, found: dict[str, InputStatistics]) -> dict[str, InputStatistics]:
    """Tells the layers that make an MLP's hidden neurons what its output layer sees of them."""
    for units in find_units(adapter.model, adapter.block_names[block]):
        if units.kind == "neurons" and units.output in found:
            for name in found.keys() & set(units.inputs):
                found[name] = replace(found[name], neurons=found[units.output].second_moment)
    return found


def _allocate(shape: tuple[int, ...], spill_to: Path | None) -> Tensor:
    """An uninitialised float32 tensor, in memory or in an unnamed file that disappears with it."""
    if spill_to is None:
        try:
            return torch.empty(shape, dtype=torch.float32)
        except RuntimeError:
            raise RunError(
                f"no memory for hidden states of shape {list(shape)}: lower `nsamples`, or set `memory_limit`"
            ) from None
    size = 4 * math.prod(shape)
    with tempfile.NamedTemporaryFile(dir=spill_to, prefix=".vitoats-hidden-", delete=True) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here; later it would be a signal
        except OSError as error:
            raise RunError(
                f"no room for {size / 1e9:.2f} GB of hidden states in {spill_to} ({error.strerror}): "
                f"free some space, or lower `nsamples`"
            ) from None
        return torch.from_file(file.name, shared=True, size=size // 4, dtype=torch.float32).view(shape)
