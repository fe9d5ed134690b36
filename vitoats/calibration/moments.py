"""Moments of layer inputs over all calibration tokens.

Sums within a batch are float32 (float64 where squares would not fit), those over batches float64. Full moments are summed about
the mean of the first batch. Those of several processes (``common.ranks``) are added up at the end.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.common import ranks
from vitoats.common.errors import InputError
from vitoats.common.finite import is_finite
from vitoats.format.int8 import fake_quantized
from vitoats.methods.statistics import InputStatistics, StatisticsLevel
from vitoats.models.blocks import Block
from vitoats.models.hooks import watch_inputs
from vitoats.models.units import find_units

ERROR_TOKENS = 8192  # of a layer; with twice as many, the H that only measures its error uses every second token, and so on
SQUARABLE = 1e-12, 1e15  # the largest of float32 values whose moments are summed in float32
MIRRORED = 1024  # from this many inputs on, one half of a second moment is copied from the other
STRIP = 512  # rows of a second moment that are worked on at a time: these matrices are large


class RunningMeans:
    """Means over tokens of several quantities at a layer, from their sums over batches."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._tokens = 0

    def add(self, sums: list[Tensor], tokens: int) -> None:
        """Adds the sums over one batch of ``tokens`` tokens, always in the same order."""
        if self._sums:
            for total, part in zip(self._sums, sums, strict=True):
                total += part
        else:
            self._sums = [part.to(torch.float64, copy=True) for part in sums]
        self._tokens += tokens

    def finish(self, name: str) -> list[Tensor]:
        """Returns the means over the tokens of all processes, float64, and consumes the sums.

        Args:
            name: the layer's name, for the error message.

        Raises:
            InputError: a mean is not finite, or there was no token.
        """
        ranks.add_up(self._sums)
        tokens = ranks.total(self._tokens)
        if not tokens:
            raise InputError(f"no token reached {name}, an expert of a mixture: give `images` more text, or raise `nsamples`")
        means, self._sums = [total.div_(tokens) for total in self._sums], []
        if not all(is_finite(mean) for mean in means):
            raise InputError(f"activations at {name} are not finite (NaN or Inf): check the weights and the calibration images")
        return means

    def finish_about(self, name: str, shift: Tensor) -> tuple[list[Tensor], Tensor]:
        """Like ``finish``, for sums of products with x - shift: H, x, and if errors e were measured, e x^T and e.

        Returns:
            the means about the first process's shift [k], and that shift.
        """
        common = ranks.of_first(shift)
        if ranks.size() > 1:
            H, x, *of_errors = self._sums
            moved = (shift - common).double()
            H += torch.outer(x, moved) + torch.outer(moved, x) + self._tokens * torch.outer(moved, moved)
            x += self._tokens * moved
            if of_errors:
                cross, error = of_errors
                cross += torch.outer(error, moved)
        return self.finish(name), common


@dataclass(frozen=True)
class _Summed:
    """The sums over one batch of an input, which several layers may share, such as q, k and v.

    Attributes:
        x: the input, as the layer got it.
        total: its sum over tokens, which tells whether it has been changed in place.
        shift: what was subtracted.
        all: sums over all tokens, and their number.
        some: the same over every n-th token, if they were asked for.
    """

    x: Tensor
    total: Tensor
    shift: Tensor
    all: tuple[list[Tensor], int]
    some: tuple[list[Tensor], int] | None = None

    def is_of(self, x: Tensor, shift: Tensor | None) -> bool:
        """Whether these are the sums of a layer's input x, from which ``shift`` is subtracted (None if that is open)."""
        return x is self.x and (shift is None or shift is self.shift) and torch.equal(_total(x), self.total)


def _total(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(dim=0)


@torch.inference_mode()
def input_statistics(
    hidden: HiddenStates,
    block: Block,
    level: StatisticsLevel = "diagonal",
    layers: list[str] | None = None,
    int8: bool = False,
    for_errors: bool = False,
) -> dict[str, InputStatistics]:
    """Runs a block over all images and measures the inputs of its linear layers.

    A fused qkv is one layer, so q, k and v share one H.

    Args:
        hidden: the hidden states before the block.
        block: the block in its current state.
        level: which statistics to collect.
        layers: names of the layers, all still dense; those of ``block.linears`` by default.
        int8: measure the inputs as a layer with int8 weights quantizes them.
        for_errors: at levels that do without them, add H and the mean of every n-th token, to measure output errors by. The
            first token differs from batch to batch.

    Returns:
        statistics by layer name, on the CPU.

    Raises:
        InputError: an activation is not finite.
    """
    names = [layer.name for layer in block.linears] if layers is None else layers
    running: dict[str, RunningMeans] = {}  # in call order
    thinned: dict[str, RunningMeans] = {}
    shifts: dict[str, Tensor] = {}
    latest: _Summed | None = None

    @torch.autocast(hidden.device.type, enabled=False)
    def measure(batch: int, name: str, x: Tensor) -> None:
        nonlocal latest
        if latest is None or not latest.is_of(x, shifts.get(name)):
            latest = None  # before its successor takes memory
            latest = summed(batch, x, shifts.get(name))
        shifts[name] = latest.shift
        running.setdefault(name, RunningMeans()).add(*latest.all)
        if latest.some:
            thinned.setdefault(name, RunningMeans()).add(*latest.some)

    def summed(batch: int, given: Tensor, shift: Tensor | None) -> _Summed:
        x = given.reshape(-1, given.shape[-1]).float()
        x = fake_quantized(x) if int8 else x
        if shift is None:
            shift = x.mean(dim=0) if len(x) else x.new_zeros(x.shape[1])
        if level == "full":
            return _Summed(given, _total(given), shift, (sums(x, shift), len(x)))
        some = hidden.thinned(x, batch, max(1, len(x) * hidden.n_batches_in_all // ERROR_TOKENS)) if for_errors else None
        squares = [exact(x).square().sum(dim=0)]
        return _Summed(given, _total(given), shift, (squares, len(x)), None if some is None else (sums(some, shift), len(some)))

    modules = {name: block.model.get_submodule(name) for name in names}
    for index, batch in enumerate(hidden.batches()):
        with watch_inputs(modules, partial(measure, index)):
            hidden.run(block, batch)
        latest = None
    for name in names:
        if name not in running:  # an expert of a mixture; another process's tokens may have reached it
            weight = block.model.get_parameter(f"{name}.weight")
            measure(0, name, torch.zeros(0, weight.shape[1], device=hidden.device))
    found = {}
    for name in running if ranks.size() == 1 else names:  # in one order everywhere
        means = running[name]
        full = means if level == "full" else thinned.pop(name, None)
        squares = None if level == "full" else means.finish(name)[0].cpu()
        if full is not None:
            (H, mean), shift = full.finish_about(name, shifts[name])
            statistics = full_statistics(H.cpu(), mean.cpu(), shift.cpu())
            found[name] = statistics if squares is None else replace(statistics, second_moment=squares)
        elif squares is not None:
            found[name] = InputStatistics(squares)
    return _with_neurons(block, found) if level == "neurons" else found


def exact(x: Tensor) -> Tensor:
    """Float64, if the squares of float32 values would be too small or too large for float32."""
    largest = x.abs().max().item() if x.numel() else 0.0
    return x if largest == 0 or SQUARABLE[0] < largest < SQUARABLE[1] else x.double()


def sums(x: Tensor, shift: Tensor) -> list[Tensor]:
    """The sums over tokens of (x - shift)^T (x - shift) [k, k] and of x - shift [k], for x [n, k] and shift [k].

    With a shift near the mean, an input that hardly varies has a variance of as many digits as any other.
    """
    x = exact(x - shift)
    return [gram(x), x.sum(dim=0)]


def gram(x: Tensor) -> Tensor:
    """x^T x [k, k] for x [n, k]: the upper triangle is computed in strips, the lower one copied from it."""
    if x.shape[1] < MIRRORED:
        return x.T @ x
    G = x.new_empty(x.shape[1], x.shape[1])
    for i in range(0, x.shape[1], STRIP):
        G[i : i + STRIP, i:] = x[:, i : i + STRIP].T @ x[:, i:]
        G[i : i + STRIP, :i] = G[:i, i : i + STRIP].T
        square = G[i : i + STRIP, i : i + STRIP]
        square.copy_(square.triu() + square.triu(1).T)
    return G


def full_statistics(H: Tensor, mean: Tensor, shift: Tensor) -> InputStatistics:
    """Statistics of x from H [d_in, d_in], which becomes that of x in place, and the mean [d_in] of x - shift."""
    shift = shift.double()
    for rows, m, s in zip(H.split(STRIP), mean.split(STRIP), shift.split(STRIP), strict=True):
        about = torch.outer(m, shift) + torch.outer(s, mean)
        about += torch.outer(s, shift)
        rows += about
    return InputStatistics(H.diagonal().clone(), H, mean + shift)


def _with_neurons(block: Block, found: dict[str, InputStatistics]) -> dict[str, InputStatistics]:
    """Gives the layers that produce an MLP's hidden neurons the second moments seen by its output layer."""
    for units in find_units(block.model, block.name):
        if units.kind == "neurons" and units.output in found:
            for name in found.keys() & set(units.inputs):
                found[name] = replace(found[name], neurons=found[units.output].second_moment)
    return found
