"""Budgets from what compressing each layer alone does to the model's features.

``vitoats.compression.sensitivity`` measures the relative error of the features, end to end and without labels, with one layer
at a time compressed at a few rates in the dense model. Its logarithm is taken to be linear in the kept share between two
rates, and errors of layers to add up; ``vitoats.allocation.lagrange`` splits a budget by that. Where the rank ratio is to be
chosen too, one more measurement a layer, without a low-rank term, says by what factor its error is another one then. Where
targets let later layers make up for what earlier ones lose, errors count the less the earlier their block is.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitoats.common.plain_values import item, number, rows, text, whole

RATES = (0.35, 0.55, 0.75, 0.9)  # compressions at which a layer is measured
RATE_WITHOUT_RANK = RATES[2]  # where it is also measured without a low-rank term
LEAST_ERROR = 1e-12  # that a logarithm is taken of
FIRST_BLOCK_SHARE = 1 / 7  # of the first block's error that later ones do not make up for; by trial: docs/oats-h.md, Allocation


@dataclass(frozen=True)
class Sensitivity:
    """What compressing one layer alone does.

    Attributes:
        name: of the layer.
        parameters: of its weight.
        errors: relative feature error at each of ``RATES``.
        without_rank: the same at ``RATE_WITHOUT_RANK`` without a low-rank term; None where that was not measured.
    """

    name: str
    parameters: int
    errors: tuple[float, ...]
    without_rank: float | None = None

    @classmethod
    def from_json(cls, row: Any) -> "Sensitivity":
        """From plain values, as ``asdict`` gives them.

        Raises:
            ValueError: these are none.
        """
        errors = tuple(number(error, "an error", least=0) for error in rows(item(row, "errors"), "errors"))
        if len(errors) != len(RATES):
            raise ValueError(f"there are {len(errors)} errors, not {len(RATES)}")
        alone = item(row, "without_rank")
        without_rank = None if alone is None else number(alone, "without_rank", least=0)
        return cls(text(item(row, "name"), "name"), whole(item(row, "parameters"), "parameters", 1), errors, without_rank)

    def scaled(self, share: float) -> "Sensitivity":
        """All errors times a share."""
        errors = tuple(share * e for e in self.errors)
        return replace(self, errors=errors, without_rank=None if self.without_rank is None else share * self.without_rank)

    def error(self, kept: np.ndarray, rank_ratio: float | None = None) -> np.ndarray:
        """The feature error at shares kept [n]: none where all is kept.

        Args:
            kept: shares.
            rank_ratio: 0 for no low-rank term; any other value is taken to be that of the measurement.
        """
        factor = 1.0
        if rank_ratio == 0 and self.without_rank is not None:
            factor = max(self.without_rank, LEAST_ERROR) / max(self.errors[RATES.index(RATE_WITHOUT_RANK)], LEAST_ERROR)
        return np.where(kept == 1, 0, factor * np.exp(self.log_error(kept)))

    def log_error(self, kept: np.ndarray) -> np.ndarray:
        """The logarithm of the feature error at shares kept [n]: linear between the rates, and beyond them as at the ends."""
        measured = 1 - np.array(RATES[::-1])
        logs = np.log(np.maximum(self.errors[::-1], LEAST_ERROR))
        logs = np.minimum.accumulate(logs)  # keeping more never hurts, up to noise
        inside = np.interp(kept, measured, logs)
        low = (logs[1] - logs[0]) / (measured[1] - measured[0])
        high = (logs[-1] - logs[-2]) / (measured[-1] - measured[-2])
        return inside + low * np.minimum(kept - measured[0], 0) + high * np.maximum(kept - measured[-1], 0)


def read_sensitivities(values: Any, layers: list[tuple[str, int]], without_rank: bool) -> list[Sensitivity]:
    """What was measured for a model, from plain values.

    Args:
        values: a row for each layer.
        layers: name and parameters of each layer of the model, in order.
        without_rank: whether each was measured without a low-rank term, too.

    Raises:
        ValueError: the values are not those of the model's layers.
    """
    found = [Sensitivity.from_json(row) for row in rows(values, "the measurement")]
    if [(s.name, s.parameters) for s in found] != layers:
        raise ValueError("the layers are not those of the model")
    if any((s.without_rank is None) == without_rank for s in found):
        raise ValueError("without_rank is missing, or was not asked for")
    return found


def counted_by_depth(sensitivities: list[Sensitivity], blocks: list[list[str]]) -> list[Sensitivity]:
    """Errors as they count where each layer also makes up for what the layers before it have lost.

    What is left of a layer's error falls geometrically with the number of blocks behind it, from all in the last block to
    ``FIRST_BLOCK_SHARE`` in the first.

    Args:
        sensitivities: measured in the dense model, where nothing is made up for.
        blocks: the names of the model's layers, block by block.
    """
    share = {name: FIRST_BLOCK_SHARE ** (1 - i / max(1, len(blocks) - 1)) for i, block in enumerate(blocks) for name in block}
    return [s.scaled(share[s.name]) for s in sensitivities]
