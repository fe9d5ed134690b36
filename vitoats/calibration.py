"""Calibration activations, block after block: what each linear layer sees, with the already compressed blocks before it.

The hidden states of all calibration images between two blocks are one tensor [n, tokens, width], updated in place. Each block
runs over it twice: once as it was, to measure the inputs of its linear layers, and once compressed, to move on.
Memory does not grow with depth:

    n * tokens * width * 4 bytes            hidden states (in memory, or in a file mapped to memory); where a block changes
                                            their shape, those before and after it, and the largest counts; twice for targets
                                            from the dense path
  + n * tokens * (10 * width) * 4           for targets from the dense path, where there is room: what a block's layers get and
                                            put out, so that little runs twice (vitoats.passes); width inputs of q, k, v,
                                            proj and fc1, 4 * width of fc2, and 3 * width of residual stream and outputs
  + batch * (tokens * 4 * 4 * width) * 4    one block at work on one batch: up to four tensors of the MLP's width
  + 6 * (largest weight matrix) * 4 bytes   the solver's buffers
  + where a method needs full second moments: 8 * (sum of d_in^2 over a block's linear layers) bytes for these, and for its
    solver 96 * (largest weight matrix) instead of 24, 48 * (largest d_in^2), and 32 MB for the rows that are refitted at once
  + the model itself and its low-rank factors (S is held with its zeros, in the place of the dense weight)

and at the end, instead of all but the model, a packed copy of the compressed weights: 4 bytes a kept parameter and a bit a
weight.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from vitoats.errors import InputError, RunError
from vitoats.methods.hessian import REFIT_BYTES
from vitoats.methods.statistics import InputStatistics, Needs
from vitoats.models.adapter import LinearLayer, ModelAdapter
from vitoats.models.units import find_units

MLP_TENSORS = 16  # a block at work: four tensors of four times the width
SOLVER_BUFFERS = 6
FULL_SOLVER_BUFFERS = 24  # the same where a method needs the full second moment: 12 matrices, in float64
MIRRORED = 1024  # inputs from which on half of a second moment is copied from the other half
HESSIAN_BUFFERS = 6  # float64 matrices [d_in, d_in] at once in such a solver: H damped, its factors, eigenvectors


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a compression will take, by purpose."""

    model: int
    hidden: int
    kept: int
    block: int
    statistics: int
    solver: int
    saving: int

    @property
    def total(self) -> int:
        """The most there is at once: at work, or while saving."""
        return self.model + max(self.hidden + self.kept + self.block + self.statistics + self.solver, self.saving)

    def __str__(self) -> str:
        def gb(n: int) -> str:
            return f"{n / 1e9:.2f} GB"

        return (
            f"{gb(self.total)} = model {gb(self.model)} + the larger of: hidden states {gb(self.hidden)} + kept of a block "
            f"{gb(self.kept)} + one block at work {gb(self.block)} + second moments {gb(self.statistics)} + solver "
            f"{gb(self.solver)}; saving {gb(self.saving)}"
        )


def estimate_memory(
    adapter: ModelAdapter,
    nsamples: int,
    batch_size: int,
    factors: int,
    compression: float,
    needs: Needs = "diagonal",
    paths: int = 1,
) -> MemoryEstimate:
    """What compressing with ``nsamples`` images will take; the formula is this module's docstring.

    Args:
        adapter: the model.
        nsamples: calibration images.
        batch_size: images at a time.
        factors: parameters of all low-rank factors.
        compression: share of the weights that is removed.
        needs: what is collected of a layer's input.
        paths: 2 where the dense model's hidden states are kept beside the compressed one's.
    """
    shapes = adapter.hidden_shapes
    stored = [math.prod(shape) for shape in shapes[:-1]]
    stored += [math.prod(a) + math.prod(b) for a, b in pairwise(shapes[:-1]) if a != b]
    sizes = [adapter.linear(linear).weight.numel() for block in adapter.linears for linear in block]
    squares = [[adapter.linear(linear).in_features ** 2 for linear in block] for block in adapter.linears]
    statistics, solver = 0, SOLVER_BUFFERS * 4 * max(sizes)
    blocks = zip(shapes, ([adapter.linear(linear).in_features for linear in block] for block in adapter.linears), strict=False)
    kept = max(math.prod(shape) * (sum(widths) / widths[0] + 3) for shape, widths in blocks if widths)
    if needs == "full":
        statistics = 8 * max(sum(block) for block in squares)
        solver = FULL_SOLVER_BUFFERS * 4 * max(sizes)
        solver += HESSIAN_BUFFERS * 8 * max(n for block in squares for n in block) + REFIT_BYTES
    return MemoryEstimate(
        model=sum(p.numel() * p.element_size() for p in adapter.model.parameters()) + factors * 4,
        hidden=paths * nsamples * max(stored) * 4,
        kept=round(nsamples * kept * 4) if paths > 1 else 0,
        block=min(batch_size, nsamples) * max(map(math.prod, shapes)) * MLP_TENSORS * 4,
        statistics=statistics,
        solver=solver,
        saving=round(sum(sizes) * (4 * (1 - compression) + 1 / 8)),
    )


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
        self, adapter: ModelAdapter, block: int, linears: list[LinearLayer], needs: Needs = "diagonal"
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
                f"no memory for hidden states of shape {list(shape)}: lower --nsamples, or set --memory-limit"
            ) from None
    size = 4 * math.prod(shape)
    with tempfile.NamedTemporaryFile(dir=spill_to, prefix=".vitoats-hidden-", delete=True) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here; later it would be a signal
        except OSError as error:
            raise RunError(
                f"no room for {size / 1e9:.2f} GB of hidden states in {spill_to} ({error.strerror}): "
                f"free some space, or lower --nsamples"
            ) from None
        return torch.from_file(file.name, shared=True, size=size // 4, dtype=torch.float32).view(shape)
