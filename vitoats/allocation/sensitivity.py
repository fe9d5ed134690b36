"""Budgets from what compressing each layer alone does to the model's features: measured end to end, without labels.

One layer at a time is compressed at a few rates in the dense model, by the cheap solver of OATS-H, and the relative error of
the features is measured. Its logarithm is taken to be linear in the kept share between two rates, and errors of layers to add
up; ``vitoats.allocation.lagrange`` splits a budget by that. Where the rank ratio is to be chosen too, one more measurement a
layer, without a low-rank term, says by what factor its error is another one then. Where targets let later layers make up for
what earlier ones lose, errors count the less the earlier their block is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.common.errors import InputError
from vitoats.common.plain_values import item, number, rows, text, whole
from vitoats.evaluation.fidelity import pooled, relative_error
from vitoats.methods.oats_h import OATSHConfig, oats_h
from vitoats.models.adapter import LinearLayer, ModelAdapter

RATES = (0.35, 0.55, 0.75, 0.9)  # compressions at which a layer is measured
RATE_WITHOUT_RANK = RATES[2]  # where it is also measured without a low-rank term
LEAST_ERROR = 1e-12  # that a logarithm is taken of
FEATURE_IMAGES = 8  # that features are measured on
FIRST_BLOCK_SHARE = 1 / 7  # of the first block's error that is left where later ones make up for it; found by trial


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


def read_sensitivities(values: Any, adapter: ModelAdapter, without_rank: bool) -> list[Sensitivity]:
    """What ``measure`` has given for a model, from plain values.

    Raises:
        ValueError: the values are not one row for each layer of the model, in order.
    """
    found = [Sensitivity.from_json(row) for row in rows(values, "the measurement")]
    layers = [(x.name, adapter.linear(x).weight.numel()) for block in adapter.linears for x in block]
    if [(s.name, s.parameters) for s in found] != layers:
        raise ValueError("the layers are not those of the model")
    if any((s.without_rank is None) == without_rank for s in found):
        raise ValueError("without_rank is missing, or was not asked for")
    return found


@torch.inference_mode()
def measure(
    adapter: ModelAdapter,
    hidden: HiddenStates,
    config: OATSHConfig,
    refit_bias: bool = False,
    without_rank: bool = False,
    feature_images: int = FEATURE_IMAGES,
    progress: Callable[[int, str], None] = lambda *_: None,
) -> list[Sensitivity]:
    """Measures every layer.

    Args:
        adapter: the dense model; unchanged afterwards.
        hidden: the images that give the layers' moments; used up.
        config: pattern and rank ratio are what the layers are compressed with.
        refit_bias: let biases take up the mean of what a layer loses, as the compression will.
        without_rank: measure each layer without a low-rank term, too.
        feature_images: at least so many of the images are also those that the features are measured on.
        progress: told the block, and what is being done.

    Raises:
        InputError: there are not two images whose features differ.
    """
    every = max(1, hidden.n_images // feature_images)
    if hidden.n_images < 2:
        raise InputError("budgets cannot be measured on one image: give `nsamples` 2 or more, or `allocation='uniform'`")
    quick = replace(config, solver="support", iterations=8, refit_rounds=2, refit_iterations=4)
    cheap = [replace(quick, compression=rate) for rate in RATES]
    if without_rank:
        cheap.append(replace(quick, compression=RATE_WITHOUT_RANK, rank_ratio=0.0))
    images = hidden.values[::every].to(hidden.device)
    reference = _features(adapter, 0, images)
    if not (reference != reference[0]).any():
        raise InputError(
            "budgets cannot be measured on images that all look the same: give `images` other ones, or `allocation='uniform'`"
        )
    found = []
    for index, linears in enumerate(adapter.linears):
        progress(index, "calibrating")
        statistics = hidden.statistics(adapter, index, linears, "full")
        images = hidden.values[::every].to(hidden.device).clone()
        for linear in linears:
            progress(index, linear.name)
            moments = statistics[linear.name].to(hidden.device)
            module = adapter.linear(linear)
            refit = refit_bias and module.bias is not None
            solved = moments.centred() if refit else moments
            dense = [p.data for p in module.parameters()]
            errors = []
            try:
                for rate in cheap:
                    parts = [oats_h(w.float(), solved, rate) for w in dense[0].chunk(linear.parts)]
                    module.weight.data = torch.cat([p.S + p.U @ p.V for p in parts]).to(dense[0])
                    if refit:
                        module.bias.data = dense[1] + moments.mean_output(dense[0] - module.weight.data).to(dense[1])
                    errors.append(relative_error(_features(adapter, index, images), reference))
            finally:
                for parameter, data in zip(module.parameters(), dense, strict=True):
                    parameter.data = data
            measured, rest = tuple(errors[: len(RATES)]), errors[len(RATES) :]
            found.append(Sensitivity(linear.name, module.weight.numel(), measured, *rest))
        if index + 1 < len(adapter.linears):
            hidden.advance(adapter, index)
    return found


def counted_by_depth(sensitivities: list[Sensitivity], blocks: list[list[LinearLayer]]) -> list[Sensitivity]:
    """Errors as they count where each layer also makes up for what the layers before it have lost.

    What is left of a layer's error falls geometrically with the number of blocks behind it, from all in the last block to
    ``FIRST_BLOCK_SHARE`` in the first.

    Args:
        sensitivities: measured in the dense model, where nothing is made up for.
        blocks: the model's layers, block by block.
    """
    share = {x.name: FIRST_BLOCK_SHARE ** (1 - i / max(1, len(blocks) - 1)) for i, block in enumerate(blocks) for x in block}
    return [s.scaled(share[s.name]) for s in sensitivities]


def _features(adapter: ModelAdapter, index: int, hidden: Tensor) -> np.ndarray:
    """Features [b, d] from the hidden states before block ``index``."""
    for i in range(index, len(adapter.linears)):
        hidden = adapter.run_block(i, hidden)
    return pooled(adapter.model, hidden).float().cpu().numpy()
