"""Splits a budget over layers so that the sum of their errors is smallest, by a Lagrange multiplier.

Every layer chooses from a list of options, each with an error and a cost: a kept share with or without a low-rank term, or the
whole layer. For a multiplier m, each layer takes the option that minimises error + m cost; m is the smallest one at which all
layers together stay within the budget. The rest is spent on the options that gain most for their cost.
"""

from collections.abc import Callable

import numpy as np

from vitoats.allocation.sensitivity import Sensitivity
from vitoats.common.errors import InputError

LEAST_KEPT, MOST_KEPT = 0.08, 0.95  # share of a layer's weights, unless it keeps all of them
GRID = 0.005  # step between kept shares

Cost = Callable[[Sensitivity, np.ndarray, float | None], np.ndarray]  # at kept shares [g] and a rank ratio


def parameters(layer: Sensitivity, kept: np.ndarray, _rank_ratio: float | None) -> np.ndarray:
    """Parameters of a layer at kept shares [g]."""
    return layer.parameters * kept


def allocate(
    sensitivities: list[Sensitivity],
    budget: float,
    cost: Cost = parameters,
    rank_ratios: tuple[float | None, ...] = (None,),
    may_stay_dense: bool = False,
) -> dict[str, dict[str, float]]:
    """Splits a budget over layers.

    Args:
        sensitivities: of all layers.
        budget: total cost allowed for all layers.
        cost: the cost of a layer; infinite if the option does not exist.
        rank_ratios: rank ratios that a layer may have; None is the config's, and does not appear in the budgets.
        may_stay_dense: whether a layer may also keep all its weights, without a low-rank term.

    Returns:
        compression by layer name, and rank_ratio if there was a choice; their total cost is ``budget`` or just below it.

    Raises:
        InputError: the budget is too small for the layers, or larger than they can cost.
    """
    grid = np.arange(LEAST_KEPT, MOST_KEPT + GRID / 2, GRID)
    choices = [(ratio, grid) for ratio in rank_ratios]
    if may_stay_dense:
        choices.append((None if rank_ratios == (None,) else 0.0, np.ones(1)))
    options = [(ratio, share) for ratio, shares in choices for share in shares]
    errors = np.array([np.concatenate([s.error(kept, ratio) for ratio, kept in choices]) for s in sensitivities])
    costs = np.array([np.concatenate([cost(s, kept, ratio) for ratio, kept in choices]) for s in sensitivities])
    chosen = split(errors, costs, budget)
    ratios = [options[i][0] for i in chosen]
    shares = np.array([options[i][1] for i in chosen])

    def moved(shift: float) -> np.ndarray:
        return np.where(shares == 1, 1, (shares + shift).clip(LEAST_KEPT, MOST_KEPT))

    low, high = 0.0, 1.0  # what the grid leaves over is shared equally by all layers
    for _ in range(60):
        middle = (low + high) / 2
        found = zip(sensitivities, moved(middle), ratios, strict=True)
        total = sum(cost(s, np.array([share]), ratio)[0] for s, share, ratio in found)
        low, high = (low, middle) if total > budget else (middle, high)
    return {
        s.name: {"compression": 1 - float(share)} | ({} if ratio is None else {"rank_ratio": ratio})
        for s, share, ratio in zip(sensitivities, moved(low), ratios, strict=True)
    }


def split(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Chooses an option for each layer.

    Args:
        errors: [layers, options].
        costs: [layers, options], infinite if an option does not exist.
        budget: total cost allowed for the chosen options.

    Returns:
        indices of the chosen options, [layers].

    Raises:
        InputError: even the cheapest options cost more, or the most expensive ones less.
    """
    dearest = np.where(np.isfinite(costs), costs, -np.inf).max(axis=1).sum()
    if not costs.min(axis=1).sum() <= budget <= dearest:
        raise out_of_range()

    def best(multiplier: float) -> np.ndarray:
        return (errors + multiplier * costs).argmin(axis=1)

    layers = np.arange(len(errors))
    low, high = 1e-30, 1e30
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if costs[layers, best(middle)].sum() > budget else (low, middle)
    chosen = best(high)
    while True:
        gained = errors[layers, chosen][:, None] - errors
        added = costs - costs[layers, chosen][:, None]
        possible = (gained > 0) & (added <= budget - costs[layers, chosen].sum())
        if not possible.any():
            return chosen
        worth = np.where(possible, gained / np.maximum(added, 1e-12 * budget), -np.inf)
        layer, option = np.unravel_index(worth.argmax(), worth.shape)
        chosen[layer] = option


def check_compression(compression: float) -> None:
    """Refuses a compression that ``allocate`` would refuse, before anything is measured.

    Raises:
        InputError: no split of the parameters gives this compression.
    """
    if not 1 - MOST_KEPT <= compression <= 1 - LEAST_KEPT:
        raise out_of_range()


def out_of_range() -> InputError:
    """The error for a budget that no split can meet."""
    return InputError(
        f"measured budgets remove {1 - MOST_KEPT:.0%} to {1 - LEAST_KEPT:.0%} of each layer, which is not what was asked for: "
        f"use `allocation='uniform'`, or ask for something between"
    )
