"""Budgets based on how compressing each layer alone affects the model's features.

``vitoats.compression.sensitivity`` finds the relative error of the features, or of text the divergence of the predictions, end
to end and without labels, with one layer at a time compressed at a few rates in the dense model. Its logarithm is assumed to
be linear in the kept share between two rates, and the errors of layers to add up; ``vitoats.allocation.lagrange`` splits a
budget on this basis. If the rank ratio is chosen as well, one more measurement per layer, without a low-rank term, gives the
factor by which its error changes. If targets let later layers make up for the errors of earlier ones, errors count less the
earlier their block is.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitoats.common.plain_values import item, number, rows, text, whole

RATES = (0.35, 0.55, 0.75, 0.9)  # compressions at which a layer is measured
RATE_WITHOUT_RANK = RATES[2]  # the rate that is also measured without a low-rank term
LEAST_ERROR = 1e-12  # smallest error whose logarithm is taken
FIRST_BLOCK_SHARE = 1 / 7  # of the first block's error, not made up for later; found by trial: docs/oats-h.md, Constants


@dataclass(frozen=True)
class Sensitivity:
    """The effect of compressing one layer alone.

    Attributes:
        name: the layer's name.
        parameters: number of weights.
        errors: relative feature error at each of ``RATES``.
        without_rank: the same at ``RATE_WITHOUT_RANK`` without a low-rank term; None if that was not measured.
    """

    name: str
    parameters: int
    errors: tuple[float, ...]
    without_rank: float | None = None

    @classmethod
    def from_json(cls, row: Any) -> "Sensitivity":
        """Reads plain values, as ``asdict`` gives them.

        Raises:
            ValueError: the values are not those of a sensitivity.
        """
        errors = tuple(number(error, "an error", least=0) for error in rows(item(row, "errors"), "errors"))
        if len(errors) != len(RATES):
            raise ValueError(f"there are {len(errors)} errors, not {len(RATES)}")
        alone = item(row, "without_rank")
        without_rank = None if alone is None else number(alone, "without_rank", least=0)
        return cls(text(item(row, "name"), "name"), whole(item(row, "parameters"), "parameters", 1), errors, without_rank)

    def scaled(self, share: float) -> "Sensitivity":
        """The same with all errors multiplied by a share."""
        errors = tuple(share * e for e in self.errors)
        return replace(self, errors=errors, without_rank=None if self.without_rank is None else share * self.without_rank)

    def error(self, kept: np.ndarray, rank_ratio: float | None = None) -> np.ndarray:
        """The feature error at kept shares [n]: zero if all is kept.

        Args:
            kept: kept shares [n].
            rank_ratio: 0 for no low-rank term; any other value is assumed to be the measured one.
        """
        factor = 1.0
        if rank_ratio == 0 and self.without_rank is not None:
            factor = max(self.without_rank, LEAST_ERROR) / max(self.errors[RATES.index(RATE_WITHOUT_RANK)], LEAST_ERROR)
        return np.where(kept == 1, 0, factor * np.exp(self.log_error(kept)))

    def log_error(self, kept: np.ndarray) -> np.ndarray:
        """The logarithm of the feature error at kept shares [n]: linear between the rates, extrapolated linearly beyond."""
        measured = 1 - np.array(RATES[::-1])
        logs = np.log(np.maximum(self.errors[::-1], LEAST_ERROR))
        logs = np.minimum.accumulate(logs)  # keeping more never hurts, up to noise
        inside = np.interp(kept, measured, logs)
        low = (logs[1] - logs[0]) / (measured[1] - measured[0])
        high = (logs[-1] - logs[-2]) / (measured[-1] - measured[-2])
        return inside + low * np.minimum(kept - measured[0], 0) + high * np.maximum(kept - measured[-1], 0)


def read_sensitivities(values: Any, layers: list[tuple[str, int]], without_rank: bool) -> list[Sensitivity]:
    """Reads the measured sensitivities of a model from plain values.

    Args:
        values: one row per layer.
        layers: name and parameters of each layer of the model, in order.
        without_rank: whether each layer was also measured without a low-rank term.

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
    """Weights the errors for targets with which each layer also makes up for the errors of the layers before it.

    The share of a layer's error that counts falls geometrically with the number of blocks behind it, from 1 in the last block
    to ``FIRST_BLOCK_SHARE`` in the first.

    Args:
        sensitivities: measured in the dense model, where no layer makes up for others.
        blocks: the names of the model's layers, block by block.
    """
    share = {name: FIRST_BLOCK_SHARE ** (1 - i / max(1, len(blocks) - 1)) for i, block in enumerate(blocks) for name in block}
    return [s.scaled(share[s.name]) for s in sensitivities]
