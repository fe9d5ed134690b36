"""Which entries of S are kept: sparsity patterns, and the hard threshold onto them.

Every pattern keeps the k largest magnitudes of each *group* of entries: a group is an output row ("row"), the whole matrix
("layer"), or M consecutive inputs of one row ("N:M", of which N are kept). For blocks ("1x2", "1x4"), a group is a row whose
units are 2 or 4 consecutive inputs, kept or removed together; a block is ranked by the sum of its squared magnitudes.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitoats.common.errors import InputError

BLOCK_WIDTHS = (2, 4)
_PAIRWISE_LIMIT = 32  # groups up to this size are ranked by comparing all pairs
_TRAILING_BITS = 14  # of a float32; the other 18 are its sign, its exponent and 9 bits of its fraction


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern.

    Attributes:
        kind: what a group is.
        n: for "N:M", how many of each m consecutive inputs are *kept*.
        m: for "N:M", the group size.
        width: how many consecutive inputs of a row are kept or removed together; above 1 for "block" only.
    """

    kind: Literal["row", "layer", "N:M", "block"]
    n: int = 0
    m: int = 0
    width: int = 1

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Reads "row", "layer", "2:4" or "1x4".

        Raises:
            InputError: the text is not a known pattern, or 0 < N < M <= 32 does not hold.
        """
        if text == "row":
            return cls("row")
        if text == "layer":
            return cls("layer")
        if text in (f"1x{width}" for width in BLOCK_WIDTHS):
            return cls("block", width=int(text[2:]))
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match and 0 < int(match[1]) < int(match[2]) <= _PAIRWISE_LIMIT:
            return cls("N:M", int(match[1]), int(match[2]))
        raise InputError(
            f"unknown pattern {text!r}: use row, layer, 1x2, 1x4, or N:M such as 2:4 "
            f"(N of M are kept, 0 < N < M <= {_PAIRWISE_LIMIT})"
        )

    def __str__(self) -> str:
        if self.kind == "block":
            return f"1x{self.width}"
        return f"{self.n}:{self.m}" if self.kind == "N:M" else self.kind

    def check_width(self, d_in: int) -> None:
        """Refuses an input width that the pattern does not tile.

        Raises:
            InputError: d_in is not a multiple of M, or of the blocks' width.
        """
        unit = self.m if self.kind == "N:M" else self.width
        if d_in % unit:
            raise InputError(
                f"pattern {self} needs an input width that is a multiple of {unit}, not {d_in}: use `pattern='row'`"
            )

    def keep(self, magnitudes: Tensor, kept: int) -> Tensor:
        """Marks the entries of a matrix that the pattern keeps.

        Args:
            magnitudes: [d_out, d_in], finite and non-negative.
            kept: entries to keep in each group; a multiple of the blocks' width.

        Returns:
            bool [d_out, d_in].
        """
        if self.kind == "block":
            return self.spread(largest(self.units(magnitudes.square()), kept // self.width))
        return largest(self.groups(magnitudes.contiguous()), kept).view_as(magnitudes)

    def units(self, matrix: Tensor) -> Tensor:
        """Sums a matrix [d_out, d_in] over each unit of ``width`` inputs: [d_out, d_in / width]."""
        return matrix.unflatten(1, (-1, self.width)).sum(dim=2)

    def spread(self, units: Tensor) -> Tensor:
        """Gives each entry the value of its unit: [d_out, d_in / width] -> [d_out, d_in]."""
        return units.repeat_interleave(self.width, dim=1)

    def groups(self, matrix: Tensor) -> Tensor:
        """Views a contiguous matrix [d_out, d_in] as [n_groups, group_size]."""
        if self.kind == "layer":
            return matrix.view(1, -1)
        return matrix.view(-1, self.m) if self.kind == "N:M" else matrix


def largest(magnitudes: Tensor, kept: int) -> Tensor:
    """Marks the ``kept`` largest entries of each row; ties go to the later column, as in a stable ascending sort.

    Args:
        magnitudes: [n_groups, group_size], finite.
        kept: how many to keep in each group, at most group_size.

    Returns:
        bool [n_groups, group_size] with exactly ``kept`` ones per row.
    """
    size = magnitudes.shape[1]
    if size <= _PAIRWISE_LIMIT:
        beaten_by = torch.zeros(magnitudes.shape, dtype=torch.uint8, device=magnitudes.device)
        for j in range(size):
            other = magnitudes[:, j : j + 1]
            beaten_by[:, :j] += other >= magnitudes[:, :j]  # ties go to the later entry
            beaten_by[:, j + 1 :] += other > magnitudes[:, j + 1 :]
        return beaten_by < kept
    if kept == 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    threshold = smallest(magnitudes, size - kept + 1)
    mask = magnitudes >= threshold
    surplus = mask.sum(dim=1, keepdim=True) - kept
    rows = surplus.squeeze(1) > 0
    if rows.any():  # several entries equal the threshold: drop the first ones
        tied = magnitudes[rows] == threshold[rows]
        mask[rows] &= ~(tied & (tied.cumsum(dim=1) <= surplus[rows]))
    return mask


def smallest(magnitudes: Tensor, k: int) -> Tensor:
    """The k-th smallest entry of each row, like ``torch.kthvalue``, but in an eighth of the time for one long float32 row.

    Non-negative floats sort like their bit patterns. So one pass counts the leading bits, the counts give those of the k-th
    entry, and only the entries that share them are searched.

    Args:
        magnitudes: [n_groups, group_size], finite and non-negative.
        k: counts from 1.

    Returns:
        [n_groups, 1].
    """
    if len(magnitudes) > 1 or magnitudes.dtype != torch.float32:
        return torch.kthvalue(magnitudes, k, dim=1, keepdim=True).values
    leading = magnitudes.view(torch.int32)[0] >> _TRAILING_BITS
    upto = torch.bincount(leading).cumsum(dim=0)
    found = int(torch.searchsorted(upto, k))
    below = int(upto[found - 1]) if found else 0
    return torch.kthvalue(magnitudes[0, leading == found], k - below, keepdim=True).values[None]


class WarmThreshold:
    """A threshold per group that follows the k-th largest magnitude from one solver step to the next.

    Between two steps of an alternating solver the magnitudes hardly change, so the last threshold is nearly right. Count how
    many entries exceed it, and correct it by one Newton step with the density of entries around it. That takes two passes
    over the matrix, where a selection needs about twenty. The count is then within a few entries of k; groups that miss it by
    more than 5 % are selected exactly. The last step of a solver calls ``largest``, which is always exact.
    """

    def __init__(self, kept: int):
        self.kept = kept
        self.threshold: Tensor  # [n_groups, 1], set by the first call
        self._started = False
        self._density: Tensor  # entries per unit of magnitude around the threshold, [n_groups, 1]

    def mark(self, magnitudes: Tensor, mask: Tensor) -> Tensor:
        """Writes 1.0 where an entry is kept and 0.0 elsewhere.

        Args:
            magnitudes: [n_groups, group_size].
            mask: the same shape and dtype; overwritten.

        Returns:
            how many entries each group keeps, [n_groups, 1], in the dtype of ``magnitudes``.
        """
        if self.kept in (0, magnitudes.shape[1]):
            mask.fill_(float(self.kept > 0))
            return torch.full_like(magnitudes[:, :1], self.kept)
        if not self._started:
            self._start(magnitudes, mask)
        self.threshold += self._excess(magnitudes, mask) / self._density
        excess = self._excess(magnitudes, mask)
        off = (excess.abs() > 1 + 0.05 * self.kept).squeeze(1)
        if off.any():
            self.threshold[off] = self._select(magnitudes[off])
            excess = self._excess(magnitudes, mask)
        return excess + self.kept

    def _start(self, magnitudes: Tensor, mask: Tensor) -> None:
        self._started = True
        exact = self._select(magnitudes)
        self.threshold = exact * 1.05
        above = self._excess(magnitudes, mask)
        self.threshold = exact * 0.95
        below = self._excess(magnitudes, mask)
        self.threshold = exact
        self._density = ((below - above).clamp(min=1) / (0.1 * exact)).nan_to_num(posinf=1.0)

    def _excess(self, magnitudes: Tensor, mask: Tensor) -> Tensor:
        """Marks the entries above the thresholds; returns by how many they exceed ``kept``, [n_groups, 1]."""
        torch.gt(magnitudes, self.threshold, out=mask)
        return mask.sum(dim=1, keepdim=True) - self.kept

    def _select(self, magnitudes: Tensor) -> Tensor:
        """Halfway between the k-th and the (k+1)-th largest, [n_groups, 1]."""
        size = magnitudes.shape[1]
        kth = torch.kthvalue(magnitudes, size - self.kept + 1, dim=1, keepdim=True).values
        following = torch.kthvalue(magnitudes, size - self.kept, dim=1, keepdim=True).values
        return (kth + following) / 2
