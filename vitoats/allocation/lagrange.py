"""Splits a budget over layers so that their errors add up to the least, by a Lagrange multiplier.

Every layer chooses from a list of options, each with an error and a cost: shares kept, with or without a low-rank term, or all
of it. For a multiplier m each layer takes what minimises error + m cost; m is the least at which all layers together stay in
the budget. What that leaves over is spent on the options that gain most for their cost.
"""

from collections.abc import Callable

import numpy as np

from vitoats.allocation.sensitivity import Sensitivity
from vitoats.common.errors import InputError

LEAST_KEPT, MOST_KEPT = 0.08, 0.95  # share of a layer's weights, where it is not all of it
GRID = 0.005  # of kept shares

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
        budget: what all layers may cost together.
        cost: what a layer costs; infinite where there is no such option.
        rank_ratios: that a layer may have; None is that of the config, and does not appear in the budgets.
        may_stay_dense: a layer may also keep all, without a low-rank term.

    Returns:
        compression, and rank_ratio where there was a choice, by layer name; they cost ``budget`` together, or just below it.

    Raises:
        InputError: the budget is too small for the layers, or they never cost as much.
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

    low, high = 0.0, 1.0  # what the grid leaves over goes to all layers alike
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
        costs: [layers, options], infinite where there is no such option.
        budget: what the options chosen may cost together.

    Returns:
        the options' indices [layers].

    Raises:
        InputError: even the cheapest cost more, or the dearest cost less.
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
    """Refuses what ``allocate`` will refuse, before anything is measured.

    Raises:
        InputError: no split of the parameters gives this compression.
    """
    if not 1 - MOST_KEPT <= compression <= 1 - LEAST_KEPT:
        raise out_of_range()


def out_of_range() -> InputError:
    """The refusal of a budget that no split meets."""
    return InputError(
        f"measured budgets remove {1 - MOST_KEPT:.0%} to {1 - LEAST_KEPT:.0%} of each layer, which is not what was asked for: "
        f"use `allocation='uniform'`, or ask for something between"
    )
