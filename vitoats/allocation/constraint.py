"""A limit on the cost of the exported model, in megabytes or milliseconds, and layer budgets that meet it."""

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

ROUNDING = 1e6  # compressions are multiples of 1 / ROUNDING

Budgets = dict[str, dict[str, float]]  # compression and optionally rank_ratio, by layer name


class LayerCost(Protocol):
    """The cost of a layer of this shape that keeps this much."""

    def __call__(self, shape: LayerShape, kept: LayerFootprint, /) -> float: ...


@dataclass(frozen=True)
class Constraint:
    """A limit on the cost of the exported model.

    Attributes:
        asked: the requested limit, such as {"speedup": 1.5}.
        unit: the unit of all costs.
        limit: the limit for the whole model.
        dense: the cost of the dense model.
        rest: the cost of everything but ``layers`` in the compressed model.
        layers: shapes of the layers that the method compresses, by name.
        cost: the cost of one such layer.
        config: the method's config; the constraint decides its compression.
        free_rank_ratio: whether layers may also do without a low-rank term.
        int8: whether these layers have int8 weights, also where nothing is removed.
        dense_name: what messages call the dense model.
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
    int8: bool = False
    dense_name: str = "the dense model"

    @cached_property
    def rank_ratios(self) -> tuple[float | None, ...]:
        """Rank ratios that a layer may have; (None,) for a method without a low-rank term."""
        ratio = getattr(self.config, "rank_ratio", None)
        return (ratio, 0.0) if self.free_rank_ratio and ratio else (ratio,)

    def layer_cost(self, name: str, kept: float, rank_ratio: float | None) -> float:
        """The cost of a layer that keeps this share of its weights; infinite if nothing would be left of it."""
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
        """If any layer has a low-rank term, those without are exported with one of zeros (``vitoats.export.layers``).

        Sparse layers with int8 weights always have one.
        """
        shape = self.layers[name]
        if (beside_low_rank or self.int8) and not kept.low_rank and not exported_dense(shape, kept, self.int8):
            kept = LayerFootprint(kept.nonzeros, shape.low_rank_parameters(1))
        return self.cost(shape, kept)

    def check(self, allocation: str) -> None:
        """Refuses a constraint that no budgets can meet.

        Args:
            allocation: "uniform", or "sensitivity", which lets each layer take the cheapest rank ratio.

        Raises:
            InputError: the limit is out of reach, or the dense model already meets it.
        """
        costs = [[self.layer_cost(name, LEAST_KEPT, ratio) for ratio in self.rank_ratios] for name in self.layers]
        whole = [self.layer_cost(name, 1.0, self.rank_ratios[0]) for name in self.layers]
        if allocation == "uniform":
            least = self.rest + min(sum(first for first, *_ in costs), sum(whole))
        else:
            least = self.rest + sum(min(*removed, kept) for removed, kept in zip(costs, whole, strict=True))
        flag, value = next(iter(self.asked.items()))
        words = f"`{flag}={value:g}`"
        if self.limit >= self.dense:
            raise InputError(f"{words} asks for nothing: {self.dense_name} takes {self.dense:.4g} {self.unit}")
        if self.limit < least:
            most = (
                f"at most {math.floor(100 * self.dense / least) / 100:g}"
                if flag == "speedup"
                else f"at least {least:.4g} {self.unit}"
            )
            raise InputError(
                f"{words} cannot be reached, as each layer keeps {LEAST_KEPT:.0%} of its weights or more: "
                f"ask for {most} ({self.dense_name} takes {self.dense:.4g} {self.unit}, all but the layers {self.rest:.4g})"
            )

    def uniform(self) -> float:
        """The least compression that meets the constraint if all layers use it with the config's rank ratio."""
        if self._uniform_cost(0.0) <= self.limit:
            return 0.0
        low, high = 0.0, 1 - LEAST_KEPT  # compressions
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._uniform_cost(middle) > self.limit else (low, middle)
        return math.ceil(high * ROUNDING) / ROUNDING

    def _uniform_cost(self, compression: float) -> float:
        """The cost of the model if all layers have this compression and the config's rank ratio."""
        return self.rest + sum(self.layer_cost(name, 1 - compression, self.rank_ratios[0]) for name in self.layers)

    def allocate(self, sensitivities: list[Sensitivity]) -> Budgets:
        """The budgets by layer name with the least error whose cost is within the limit.

        A layer may keep all its weights. With int8 weights all layers may, where dense int8 products are fast enough.
        """
        if self._uniform_cost(0.0) <= self.limit:
            whole = {"compression": 0.0} if self.rank_ratios == (None,) else {"compression": 0.0, "rank_ratio": 0.0}
            return dict.fromkeys(self.layers, whole)
        layers = [s for s in sensitivities if s.name in self.layers]

        def cost(layer: Sensitivity, kept: np.ndarray, rank_ratio: float | None) -> np.ndarray:
            return np.array([self.layer_cost(layer.name, share, rank_ratio) for share in kept.tolist()])

        return allocate(layers, self.limit - self.rest, cost, self.rank_ratios, may_stay_dense=True)

    def footprints(self, config: Any, budgets: Budgets | None) -> dict[str, LayerFootprint]:
        """The footprint of each layer, by name."""
        own = budgets or {}
        return {name: self._footprint(name, replace(config, **own.get(name, {}))) for name in self.layers}

    def predicted(self, footprints: dict[str, LayerFootprint]) -> float:
        """The predicted cost of the whole model."""
        some = any(kept.low_rank for name, kept in footprints.items() if not exported_dense(self.layers[name], kept, self.int8))
        return self.rest + sum(self._cost(name, kept, some) for name, kept in footprints.items())

    def compression(self, footprints: dict[str, LayerFootprint]) -> float:
        """The share of the layers' weights that is removed."""
        kept = sum(c.parameters for c in footprints.values()) / sum(shape.size for shape in self.layers.values())
        return round(ROUNDING * (1 - kept)) / ROUNDING

    def to_dict(self) -> dict[str, Any]:
        """The requested limit and the measured costs, as plain values."""
        return {**self.asked, "unit": self.unit, "limit": self.limit, "dense": self.dense, "rest": self.rest}
