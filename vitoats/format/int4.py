"""4-bit weights: symmetric round-to-nearest in groups, as ONNX Runtime's MatMulNBits stores them without zero points.

A group is ``GROUP`` neighbouring inputs of a row. Its scale s makes its entry of largest magnitude -8, and w ~ s q with q from
-8 to 7. Only the values are computed here, to measure what they cost; nothing stores or multiplies them.
"""

import torch.nn.functional as F
from torch import Tensor

GROUP = 32
LOWEST, HIGHEST = -8, 7


def round_groups(weight: Tensor, group: int = GROUP) -> Tensor:
    """The weights [d_out, d_in] that 4 bits stand for, in the same type."""
    d_out, d_in = weight.shape
    groups = F.pad(weight.float(), (0, -d_in % group)).view(d_out, -1, group)
    scale = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)) / LOWEST
    q = (groups / scale.where(scale != 0, 1)).round().clamp(LOWEST, HIGHEST)
    return (q * scale).view(d_out, -1)[:, :d_in].to(weight.dtype)
