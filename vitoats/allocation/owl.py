"""OWL (Yin et al., arXiv 2310.05175): blocks with more outliers keep more.

The outlier share of a block is the share of its scores |W_ij| ||X_j||, all linear layers pooled, that are above M times
their mean. Densities of the blocks are the outlier shares, mapped linearly onto an interval of width 2 Lambda and then shifted
so that their mean, weighted by the blocks' sizes, is the model's density; as in the published code single blocks may so leave
density +- Lambda.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.models.adapter import ModelAdapter

OUTLIER = 5.0  # M, of the paper's main results
SPREAD = 0.08  # Lambda
LEAST, MOST = 0.01, 0.99  # of the weights, removed from a block


@torch.inference_mode()
def outlier_shares(
    adapter: ModelAdapter, hidden: HiddenStates, outlier: float = OUTLIER, progress: Callable[[int], None] = lambda _: None
) -> list[float]:
    """The share of outliers of each block of the dense model that has linear layers, 0 to 1; ``hidden`` is used up."""
    shares = []
    for index, linears in enumerate(adapter.linears):
        progress(index)
        if linears:
            statistics = hidden.statistics(adapter, index, linears)
            scores = torch.cat(
                [
                    (adapter.linear(x).weight.detach().abs().cpu() * statistics[x.name].second_moment.sqrt()).flatten()
                    for x in linears
                ]
            )
            shares.append((scores > outlier * scores.mean()).double().mean().item())
        if index + 1 < len(adapter.linears):
            hidden.advance(adapter, index)
    return shares


def owl(adapter: ModelAdapter, shares: list[float], compression: float, spread: float = SPREAD) -> dict[str, dict[str, float]]:
    """Budgets by layer name, the same for all layers of a block.

    Args:
        adapter: the model.
        shares: of outliers, of each block with linear layers.
        compression: of the whole model.
        spread: Lambda.
    """
    blocks = [block for block in adapter.linears if block]
    outliers = torch.tensor(shares, dtype=torch.float64)
    sizes = torch.tensor([sum(adapter.linear(x).weight.numel() for x in block) for block in blocks], dtype=torch.float64)
    width = outliers.max() - outliers.min()
    mapped: Tensor = (outliers - outliers.min()) / width * 2 * spread if width > 0 else torch.zeros_like(outliers)
    density = mapped - (mapped * sizes).sum() / sizes.sum() + 1 - compression
    removed = (1 - density).clamp(LEAST, MOST).tolist()
    return {x.name: {"compression": rho} for block, rho in zip(blocks, removed, strict=True) for x in block}
