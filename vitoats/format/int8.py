"""int8: rounding the rows of a matrix, and the tokens of an input.

A row of weights is a float32 scale times whole numbers from -127 to 127. A token v of an input is rounded while the model runs,
in float32 and with zero in its range, so v ~ scale (q - zero):

    lo = min(0, min v)    hi = max(0, max v)    scale = hi / 255 - lo / 255
    zero = round(-lo / scale)    q = clamp(round(v / scale) + zero, 0, 255)

This is exactly what the native operators compute: halves are rounded to even, and divisions are products with a reciprocal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitoats.common import linalg

LEVELS = 127  # the largest integer of a weight
Rounded = tuple[Tensor, Tensor]  # int8 [n, k], and the scales of its rows, float32 [n]

_TOKEN_LEVELS = 255
_SMALLEST = torch.finfo(torch.float32).tiny  # the smallest normal number; what is below counts as zero


def row_scales(W: Tensor) -> Tensor:
    """The scale of each row of W [n, k], float32 [n]: its largest magnitude / 127; 1 for a row of zeros (or of subnormals).

    W must be finite.
    """
    largest = W.abs().amax(dim=1) if W.shape[1] else W.new_zeros(len(W))
    scale = (largest / LEVELS).float()
    return torch.where(scale >= _SMALLEST, scale, torch.ones_like(scale))


def round_rows(W: Tensor) -> Rounded:
    """Rounds the rows of W [n, k] to nearest: int8 [n, k] and their scales, float32 [n]. W must be finite."""
    scale = row_scales(W)
    return (W / scale[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def dequantized(rounded: Tensor, scale: Tensor) -> Tensor:
    """The matrix [n, k] that the int8 ``rounded`` [n, k] and ``scale`` [n] stand for, in the scale's dtype."""
    return rounded.to(scale.dtype) * scale[:, None]


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each token of x [..., k].

    Returns:
        q, uint8 [..., k]; scale and zero, float32 [..., 1], where zero is a whole number. A token whose scale would be zero or
        subnormal gets all zeros. One that holds an infinity or NaN gets zeros with the scale NaN.
    """
    x = x.float()
    low, high = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = high * (1 / _TOKEN_LEVELS) - low * (1 / _TOKEN_LEVELS)
    finite = torch.isfinite(scale)
    scale = torch.where(finite & (scale >= _SMALLEST), scale, 0)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    zero = torch.where(finite, (-low * inverse).round(), 0)
    q = torch.where(finite, ((x * inverse).round() + zero).clamp(0, _TOKEN_LEVELS), 0)
    return q.to(torch.uint8), torch.where(finite, scale, torch.nan), zero


def fake_quantized(x: Tensor) -> Tensor:
    """What the tokens of x [..., k] become by ``quantize_tokens``: scale (q - zero), in x's dtype."""
    q, scale, zero = quantize_tokens(x)
    return (scale * (q - zero)).to(x.dtype)


def balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Other factors U [n, r], V [r, k] of the same product, of which each takes the root of its singular values."""
    if U.shape[1] == 0:
        return U, V
    (Qu, Ru), (Qv, Rv) = linalg.qr(U.double()), linalg.qr(V.double().T)
    P, singular, R = linalg.svd(Ru @ Rv.T, full_matrices=False)
    root = singular.sqrt()
    unused = U.shape[1] - len(root)  # of a rank above n or k
    u, v = Qu @ (P * root), root[:, None] * (Qv @ R.T).T
    return F.pad(u, (0, unused)).to(U.dtype), F.pad(v, (0, 0, 0, unused)).to(V.dtype)


def rounded_factors(U: Tensor, V: Tensor) -> tuple[Rounded, Rounded]:
    """Balances U [n, r] and V [r, k], and rounds them."""
    U, V = balanced(U, V)
    return round_rows(U), round_rows(V)
