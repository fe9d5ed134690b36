"""How many parameters a layer keeps: from compression and rank ratio to a rank and a number of non-zeros.

``compression`` (rho) is the share of a layer's weights that is removed; ``rank_ratio`` (kappa) is the share of the *kept*
parameters that goes to the low-rank term. A kept entry of S counts 1, a rank-r term counts r * (d_in + d_out); indices and
biases do not count. This follows OATS (arXiv 2409.13652), including the rounding of its published code.
"""

from dataclasses import dataclass

from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.methods.sparsity import Pattern


@dataclass(frozen=True)
class LayerBudget:
    """What one weight matrix may keep: the ``rank`` of UV, and ``kept_per_group`` entries of S in each group of the pattern."""

    rank: int
    kept_per_group: int


def effective_compression(compression: float | None, rank_ratio: float | None, pattern: Pattern) -> float:
    """Returns rho. N:M fixes the density of S at n/m, so 1 - rho = (n/m) / (1 - kappa); other patterns use rho as given.

    Args:
        compression: the requested rho; None leaves it to the pattern.
        rank_ratio: kappa; None for a method without a low-rank term.
        pattern: the sparsity pattern of S.

    Raises:
        InputError: a value is out of range, nothing would be left, or rho contradicts what N:M and kappa imply.
    """
    kappa = 0.0 if rank_ratio is None else rank_ratio
    if not 0.0 <= kappa <= 1.0:
        raise InputError(f"rank ratio {rank_ratio:g} is out of range: `rank_ratio` takes a number from 0 to 1")
    if compression is not None and not 0.0 <= compression < 1.0:
        raise InputError(
            f"compression {compression:g} is out of range: `compression` takes the share of weights to remove, "
            f"from 0 up to but not 1"
        )
    if pattern.kind != "N:M":
        if compression is None:
            raise InputError(f"pattern {pattern} needs a compression: give `compression`, say 0.5")
        return compression
    density = pattern.n / pattern.m
    if kappa >= 1 - density:
        raise InputError(
            f"pattern {pattern} keeps {density:.0%} of S, so with rank ratio {rank_ratio:g} nothing would be removed: "
            f"use a `rank_ratio` below {1 - density:g}"
        )
    implied = 1 - density / (1 - kappa)
    if compression is not None and abs(compression - implied) > 0.002:
        reachable = 1 - density / (1 - compression)
        remedy = f"leave `compression` out (it is then {implied:.4g})"
        if rank_ratio is not None and reachable >= 0:
            remedy += f", or give `rank_ratio` {reachable:.4g}"
        with_rank = "" if rank_ratio is None else f" with rank ratio {rank_ratio:g}"
        raise InputError(f"pattern {pattern}{with_rank} means compression {implied:.4g}, not {compression:g}: {remedy}")
    return implied


def layer_budget(d_out: int, d_in: int, compression: float, rank_ratio: float, pattern: Pattern) -> LayerBudget:
    """Splits a layer's budget into a rank and non-zeros.

    rank = int(kappa * (1 - rho) * d_out * d_in / (d_out + d_in)); a row of S loses int(d_in * s) entries, with
    s = 1 - (1 - kappa) * (1 - rho). A layer-wise pattern keeps the same total as the row-wise one. With blocks, each row is
    rounded to the nearest number of whole blocks, halves up.

    Raises:
        InputError: nothing would be left of the layer, or the pattern does not fit its d_in.
    """
    pattern.check_width(d_in)
    kept = 1 - compression
    rank = int(rank_ratio * kept * (d_out * d_in) / (d_out + d_in))
    per_row = d_in - int(d_in * (1 - (1 - rank_ratio) * kept))
    if pattern.kind == "N:M":
        return LayerBudget(rank, pattern.n)
    per_row = (per_row + pattern.width // 2) // pattern.width * pattern.width
    if rank == 0 and per_row == 0:
        raise InputError(
            f"compression {compression:g} with rank ratio {rank_ratio:g} leaves nothing of a {d_out} x {d_in} layer: "
            f"lower `compression`"
        )
    return LayerBudget(rank, d_out * per_row if pattern.kind == "layer" else per_row)


def check_iterations(iterations: int) -> None:
    """Refuses fewer than one iteration.

    Raises:
        InputError: ``iterations`` is below one.
    """
    if iterations < 1:
        raise InputError(f"{iterations} iterations are too few: `iterations` takes 1 or more")


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Settings shared by all methods without a low-rank term.

    Attributes:
        compression: rho, the share of the weights that is removed. None with an N:M pattern, which implies 1 - N/M.
        pattern: "row", "layer", "1x2", "1x4" or "N:M" (N of M are kept).
    """

    compression: float | None = 0.5
    pattern: str = "row"

    def __post_init__(self):
        self.total_compression()

    def total_compression(self) -> float:
        """rho, as given or as implied by an N:M pattern."""
        return effective_compression(self.compression, None, Pattern.parse(self.pattern))

    def budget(self, d_out: int, d_in: int) -> LayerBudget:
        """What a d_out x d_in matrix may keep: rank 0, and the entries of S."""
        return layer_budget(d_out, d_in, self.total_compression(), 0.0, Pattern.parse(self.pattern))

    def mask(self, magnitudes: Tensor) -> Tensor:
        """Marks the entries to keep, bool [d_out, d_in]: the largest magnitudes [d_out, d_in] that pattern and budget allow."""
        return Pattern.parse(self.pattern).keep(magnitudes, self.budget(*magnitudes.shape).kept_per_group)


@dataclass(frozen=True, kw_only=True)
class SparseLowRankConfig:
    """Settings shared by the sparse + low-rank methods.

    Attributes:
        compression: rho, the share of the weights that is removed. None with an N:M pattern, which implies it.
        rank_ratio: kappa, the share of the kept parameters that goes to the low-rank term.
        pattern: the pattern of S: "row", "layer", "1x2", "1x4" or "N:M" (N of M are kept).
    """

    compression: float | None = 0.5
    rank_ratio: float = 0.2
    pattern: str = "row"

    def __post_init__(self):
        self.total_compression()

    def total_compression(self) -> float:
        """rho, as given or as implied by an N:M pattern."""
        return effective_compression(self.compression, self.rank_ratio, Pattern.parse(self.pattern))

    def budget(self, d_out: int, d_in: int) -> LayerBudget:
        """What a d_out x d_in matrix may keep."""
        return layer_budget(d_out, d_in, self.total_compression(), self.rank_ratio, Pattern.parse(self.pattern))
