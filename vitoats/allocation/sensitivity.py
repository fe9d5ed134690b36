"""Budgets from what compressing each layer alone does to the model's features: measured end to end, without labels.

One layer at a time is compressed at a few rates in the dense model, by the cheap solver of OATS-H, and the relative error of
the features is measured. Its logarithm is taken to be linear in the kept share between two rates, and errors of layers to add
up. Then the budget is split by a Lagrange multiplier: every layer keeps what minimises its error plus the multiplier times
what it keeps.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitoats.calibration import HiddenStates
from vitoats.errors import InputError
from vitoats.evaluate.fidelity import pooled, relative_error
from vitoats.methods.oats_h import OATSHConfig, oats_h
from vitoats.models.adapter import ModelAdapter

RATES = (0.35, 0.55, 0.75, 0.9)  # compressions at which a layer is measured
EVERY = 3  # every third image is also one that the features are measured on
LEAST_KEPT, MOST_KEPT = 0.08, 0.95  # share of a layer's weights
GRID = 0.005  # of kept shares


@dataclass(frozen=True)
class Sensitivity:
    """What compressing one layer alone does.

    Attributes:
        name: of the layer.
        parameters: of its weight.
        errors: relative feature error at each of ``RATES``.
    """

    name: str
    parameters: int
    errors: tuple[float, ...]

    def log_error(self, kept: np.ndarray) -> np.ndarray:
        """The logarithm of the feature error at shares kept [n]: linear between the rates, and beyond them as at the ends."""
        measured = 1 - np.array(RATES[::-1])
        logs = np.log(np.maximum(self.errors[::-1], 1e-12))
        logs = np.minimum.accumulate(logs)  # keeping more never hurts, up to noise
        inside = np.interp(kept, measured, logs)
        low = (logs[1] - logs[0]) / (measured[1] - measured[0])
        high = (logs[-1] - logs[-2]) / (measured[-1] - measured[-2])
        return inside + low * np.minimum(kept - measured[0], 0) + high * np.maximum(kept - measured[-1], 0)


Cost = Callable[[Sensitivity, np.ndarray], np.ndarray]


@torch.inference_mode()
def measure(
    adapter: ModelAdapter,
    hidden: HiddenStates,
    config: OATSHConfig,
    progress: Callable[[int, str], None] = lambda *_: None,
) -> list[Sensitivity]:
    """Measures every layer.

    Args:
        adapter: the dense model; unchanged afterwards.
        hidden: the images that give the layers' moments, every third of which gives features too; used up.
        config: pattern and rank ratio are what the layers are compressed with.
        progress: told the block, and what is being done.

    Raises:
        InputError: there are not two images whose features could be compared.
    """
    every = EVERY if hidden.n_images > EVERY else 1
    if hidden.n_images < 2:
        raise InputError("budgets cannot be measured on one image: give --nsamples 2 or more, or --allocation uniform")
    quick = replace(config, solver="support", iterations=8, refit_rounds=2, refit_iterations=4)
    cheap = [replace(quick, compression=rate) for rate in RATES]
    images = hidden.values[::every].to(hidden.device)
    reference = _features(adapter, 0, images)
    found = []
    for index, linears in enumerate(adapter.linears):
        progress(index, "calibrating")
        statistics = hidden.statistics(adapter, index, linears, "full")
        images = hidden.values[::every].to(hidden.device).clone()
        for linear in linears:
            progress(index, linear.name)
            moments = statistics[linear.name].to(hidden.device).centred()
            module = adapter.linear(linear)
            errors = []
            weight = module.weight.data
            try:
                for rate in cheap:
                    parts = [oats_h(w.float(), moments, rate) for w in weight.chunk(linear.parts)]
                    module.weight.data = torch.cat([p.S + p.U @ p.V for p in parts]).to(weight)
                    errors.append(relative_error(_features(adapter, index, images), reference))
            finally:
                module.weight.data = weight
            found.append(Sensitivity(linear.name, module.weight.numel(), tuple(errors)))
        if index + 1 < len(adapter.linears):
            hidden.advance(adapter, index)
    return found


def parameters(layer: Sensitivity, kept: np.ndarray) -> np.ndarray:
    """Parameters of a layer at kept shares [g]."""
    return layer.parameters * kept


def allocate(sensitivities: list[Sensitivity], budget: float, cost: Cost = parameters) -> dict[str, dict[str, float]]:
    """Splits a budget so that the layers' errors add up to the least.

    Args:
        sensitivities: of all layers.
        budget: what all layers may cost together.
        cost: what a layer costs at kept shares [g], rising with them.

    Returns:
        budgets by layer name, which cost ``budget`` together.

    Raises:
        InputError: the budget is too small for the layers, or they never cost as much.
    """
    kept = np.arange(LEAST_KEPT, MOST_KEPT + GRID / 2, GRID)  # [g]
    errors = np.exp([s.log_error(kept) for s in sensitivities])  # [layers, g]
    costs = np.array([cost(s, kept) for s in sensitivities])  # [layers, g]
    if not costs[:, 0].sum() <= budget <= costs[:, -1].sum():
        raise _out_of_range()
    low, high = 1e-30, 1e30  # multipliers
    for _ in range(200):
        middle = (low * high) ** 0.5
        chosen = (errors + middle * costs).argmin(axis=1)[:, None]
        low, high = (middle, high) if np.take_along_axis(costs, chosen, axis=1).sum() > budget else (low, middle)
    shares = kept[(errors + high * costs).argmin(axis=1)]

    def moved(shift: float) -> np.ndarray:
        return (shares + shift).clip(LEAST_KEPT, MOST_KEPT)

    low, high = -1.0, 1.0  # what the grid leaves over goes to all layers alike
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(cost(s, share) for s, share in zip(sensitivities, moved(middle), strict=True))
        low, high = (low, middle) if total > budget else (middle, high)
    return {s.name: {"compression": 1 - float(share)} for s, share in zip(sensitivities, moved(low), strict=True)}


def check_compression(compression: float) -> None:
    """Refuses what ``allocate`` will refuse, before anything is measured.

    Raises:
        InputError: no split of the parameters gives this compression.
    """
    if not 1 - MOST_KEPT <= compression <= 1 - LEAST_KEPT:
        raise _out_of_range()


def _out_of_range() -> InputError:
    return InputError(
        f"measured budgets remove {1 - MOST_KEPT:.0%} to {1 - LEAST_KEPT:.0%} of each layer, which is not what was asked for: "
        f"use --allocation uniform, or ask for something between"
    )


def cached(key: str, make: Callable[[], list[Sensitivity]]) -> list[Sensitivity]:
    """Sensitivities from the user's cache, or made and put there.

    Args:
        key: identifies model, images and settings.
        make: measures them.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitoats" / f"sensitivity_{key[:32]}.json"
    try:
        rows = json.loads(path.read_text())
        return [Sensitivity(row["name"], int(row["parameters"]), tuple(row["errors"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.writing")
        partial.write_text(json.dumps([asdict(row) for row in made]))
        partial.replace(path)
    except OSError:
        pass  # a cache that cannot be written is no reason to stop
    return made


def _features(adapter: ModelAdapter, index: int, hidden: Tensor) -> np.ndarray:
    """Features [b, d] from the hidden states before block ``index``."""
    for i in range(index, len(adapter.linears)):
        hidden = adapter.run_block(i, hidden)
    return pooled(adapter.model, hidden).float().cpu().numpy()
