"""OWL (Yin et al., arXiv 2310.05175): blocks with more outliers keep more.

The outlier share of a block is the share of its scores |W_ij| ||X_j||, all linear layers pooled, that exceed M times their
mean (``vitoats.compression.outliers`` measures it). The blocks' densities are the outlier shares, mapped linearly onto an
interval of width 2 Lambda and then shifted so that their mean, weighted by the blocks' sizes, is the model's density. As in the
published code, single blocks may therefore leave density +- Lambda. Blocks that reach the least or the largest density stay
there, and the others are shifted further, so that the mean is right at every compression.
"""

import torch
from torch import Tensor

SPREAD = 0.08  # Lambda
LEAST, MOST = 0.01, 0.99  # share of the weights removed from a block, unless the model's lies outside
HALVINGS = 60  # of the interval that holds the shift


def owl(
    shares: list[float], blocks: list[dict[str, int]], compression: float, spread: float = SPREAD
) -> dict[str, dict[str, float]]:
    """Budgets by layer name, the same for all layers of a block.

    Args:
        shares: the outlier share of each block.
        blocks: for each block, the number of weights of its layers by name.
        compression: for the whole model.
        spread: Lambda.
    """
    outliers = torch.tensor(shares, dtype=torch.float64)
    sizes = torch.tensor([sum(block.values()) for block in blocks], dtype=torch.float64)
    width = outliers.max() - outliers.min()
    mapped: Tensor = (outliers - outliers.min()) / width * 2 * spread if width > 0 else torch.zeros_like(outliers)
    least, most = min(LEAST, compression), max(MOST, compression)
    removed = shifted(-mapped, sizes, compression, least, most).tolist()
    return {name: {"compression": rho} for block, rho in zip(blocks, removed, strict=True) for name in block}


def shifted(values: Tensor, sizes: Tensor, mean: float, least: float, most: float) -> Tensor:
    """The values [n] plus a constant, clamped to [least, most], such that their mean, weighted by sizes [n], is ``mean``."""
    low, high = least - values.max().item(), most - values.min().item()  # all at the least, all at the most
    for _ in range(HALVINGS):
        shift = (low + high) / 2
        found = (values + shift).clamp(least, most)
        if (found @ sizes / sizes.sum()).item() < mean:
            low = shift
        else:
            high = shift
    return found
