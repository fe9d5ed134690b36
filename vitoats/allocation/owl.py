"""OWL (Yin et al., arXiv 2310.05175): blocks with more outliers keep more.

The outlier share of a block is the share of its scores |W_ij| ||X_j||, all linear layers pooled, that exceed M times their
mean (``vitoats.compression.outliers`` measures it). The blocks' densities are the outlier shares, mapped linearly onto an
interval of width 2 Lambda and then shifted so that their mean, weighted by the blocks' sizes, is the model's density. As in the
published code, single blocks may therefore leave density +- Lambda.
"""

import torch
from torch import Tensor

SPREAD = 0.08  # Lambda
LEAST, MOST = 0.01, 0.99  # share of the weights removed from a block


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
    density = mapped - (mapped * sizes).sum() / sizes.sum() + 1 - compression
    removed = (1 - density).clamp(LEAST, MOST).tolist()
    return {name: {"compression": rho} for block, rho in zip(blocks, removed, strict=True) for name in block}
