"""A limit on what the exported model may cost, in megabytes or milliseconds, and the budgets of layers that meet it."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from vitoats.allocation.cost import LayerFootprint, dense, exported_dense, footprint
from vitoats.allocation.lagrange import LEAST_KEPT, allocate
from vitoats.allocation.sensitivity import Sensitivity
from vitoats.common.errors import InputError
from vitoats.models.shapes import LayerShape

ROUNDING = 1e6  # compressions are whole multiples of one over it

Budgets = dict[str, dict[str, float]]  # compression, and perhaps rank_ratio, by layer name


class LayerCost(Protocol):
    """What a layer of a shape costs when it holds that much."""

    def __call__(self, shape: LayerShape, kept: LayerFootprint, /) -> float: ...


@dataclass(frozen=True)
class Constraint:
    """What the exported model may cost.

    Attributes:
        asked: the flag and its value, such as {"speedup": 1.5}.
        unit: of all that follows.
        limit: of the whole model.
        dense: what the dense model costs.
        rest: what all but ``layers`` costs in the compressed model.
        layers: shapes of the layers that the method compresses, by name.
        cost: of one of them.
        config: of the method; its compression is what the constraint decides.
        free_rank_ratio: layers may also do without a low-rank term.
    """

    asked: dict[str, float]
    unit: Literal["ms", "MB"]
    limit: float
    dense: float
    rest: float
    layers: dict[str, LayerShape]
    cost: LayerCost
    config: Any
    free_rank_ratio: bool

    @cached_property
    def rank_ratios(self) -> tuple[float | None, ...]:
        """That a layer may have; None for a method without any."""
        ratio = getattr(self.config, "rank_ratio", None)
        return (ratio, 0.0) if self.free_rank_ratio and ratio else (ratio,)

    def layer_cost(self, name: str, kept: float, rank_ratio: float | None) -> float:
        """What a layer costs at a share of its weights; infinite where nothing would be left of it."""
        ratio = {} if rank_ratio is None else {"rank_ratio": rank_ratio}
        config = replace(self.config, compression=1 - kept, **ratio)
        try:
            return self._cost(name, self._footprint(name, config), beside_low_rank=bool(self.rank_ratios[0]))
        except InputError:
            return math.inf

    def _footprint(self, name: str, config: Any) -> LayerFootprint:
        shape = self.layers[name]
        return footprint(shape, config) if config.total_compression() > 0 else dense(shape)

    def _cost(self, name: str, kept: LayerFootprint, beside_low_rank: bool) -> float:
        """Beside layers with a low-rank term, those without are exported with one of zeros (``vitoats.export.layers``)."""
        shape = self.layers[name]
        if beside_low_rank and not kept.low_rank and not exported_dense(shape, kept):
            kept = LayerFootprint(kept.nonzeros, shape.low_rank_parameters(1))
        return self.cost(shape, kept)

    def check(self, allocation: str) -> None:
        """Refuses a constraint that no budgets meet.

        Args:
            allocation: "uniform", or "sensitivity", where each layer may take the cheapest rank ratio.

        Raises:
            InputError: it cannot be reached, or the dense model meets it already.
        """
        ratios = self.rank_ratios[:1] if allocation == "uniform" else self.rank_ratios
        least = self.rest + sum(min(self.layer_cost(name, LEAST_KEPT, ratio) for ratio in ratios) for name in self.layers)
        flag, value = next(iter(self.asked.items()))
        words = f"`{flag}={value:g}`"
        if self.limit >= self.dense:
            raise InputError(f"{words} asks for nothing: the dense model takes {self.dense:.4g} {self.unit}")
        if self.limit < least:
            most = (
                f"at most {math.floor(100 * self.dense / least) / 100:g}"
                if flag == "speedup"
                else f"at least {least:.4g} {self.unit}"
            )
            raise InputError(
                f"{words} cannot be reached, as each layer keeps {LEAST_KEPT:.0%} of its weights or more: "
                f"ask for {most} (the dense model takes {self.dense:.4g} {self.unit}, all but the layers {self.rest:.4g})"
            )

    def uniform(self) -> float:
        """The least compression that meets the constraint when all layers have it, and the config's rank ratio."""
        ratio = self.rank_ratios[0]
        low, high = 0.0, 1 - LEAST_KEPT  # compressions
        for _ in range(40):
            middle = (low + high) / 2
            total = self.rest + sum(self.layer_cost(name, 1 - middle, ratio) for name in self.layers)
            low, high = (middle, high) if total > self.limit else (low, middle)
        return math.ceil(high * ROUNDING) / ROUNDING

    def allocate(self, sensitivities: list[Sensitivity]) -> Budgets:
        """Budgets by layer name that cost no more than the limit, with the least error."""
        layers = [s for s in sensitivities if s.name in self.layers]

        def cost(layer: Sensitivity, kept: np.ndarray, rank_ratio: float | None) -> np.ndarray:
            return np.array([self.layer_cost(layer.name, share, rank_ratio) for share in kept.tolist()])

        return allocate(layers, self.limit - self.rest, cost, self.rank_ratios, may_stay_dense=True)

    def footprints(self, config: Any, budgets: Budgets | None) -> dict[str, LayerFootprint]:
        """What each layer will hold, by name."""
        own = budgets or {}
        return {name: self._footprint(name, replace(config, **own.get(name, {}))) for name in self.layers}

    def predicted(self, footprints: dict[str, LayerFootprint]) -> float:
        """What the whole model will cost."""
        some = any(kept.low_rank for name, kept in footprints.items() if not exported_dense(self.layers[name], kept))
        return self.rest + sum(self._cost(name, kept, some) for name, kept in footprints.items())

    def compression(self, footprints: dict[str, LayerFootprint]) -> float:
        """The share of the layers' weights that is removed."""
        kept = sum(c.parameters for c in footprints.values()) / sum(shape.size for shape in self.layers.values())
        return round(ROUNDING * (1 - kept)) / ROUNDING

    def to_dict(self) -> dict[str, Any]:
        """What was asked for and measured, as plain values."""
        return {**self.asked, "unit": self.unit, "limit": self.limit, "dense": self.dense, "rest": self.rest}
