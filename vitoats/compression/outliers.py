"""Measures the outlier shares of blocks, by which OWL (``vitoats.allocation.owl``) splits a budget."""

from collections.abc import Callable

import torch

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.moments import input_statistics
from vitoats.calibration.walk import walk
from vitoats.models.blocks import Block

OUTLIER = 5.0  # M, of the paper's main results


@torch.inference_mode()
def outlier_shares(
    blocks: list[Block], hidden: HiddenStates, outlier: float = OUTLIER, progress: Callable[[int], None] = lambda _: None
) -> list[float]:
    """The share of outliers of each block that has linear layers, 0 to 1.

    It is the share of the scores |W_ij| ||X_j||, all linear layers pooled, that exceed ``outlier`` times their mean.

    Args:
        blocks: the dense model's blocks.
        hidden: the hidden states before the first block; advanced in place.
        outlier: M.
        progress: called with the block's index.
    """
    shares = []
    for index, block in enumerate(walk(blocks, hidden)):
        progress(index)
        if block.linears:
            statistics = input_statistics(hidden, block)
            scores = torch.cat(
                [
                    (x.module.weight.detach().abs().cpu() * statistics[x.name].second_moment.sqrt()).flatten()
                    for x in block.linears
                ]
            )
            shares.append((scores > outlier * scores.mean()).double().mean().item())
    return shares
