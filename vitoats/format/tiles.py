"""The layout of int8 weights in an exported file: the order in which the native kernels read them.

A *strip* is 16 outputs (rows of W), a *quad* 4 inputs (columns):

    tiled(W)[s, q, j, i] = W[16 s + j, 4 q + i]          int8 [ceil(N / 16), ceil(K / 4), 16, 4]

with zeros past the last row and column. A sparse matrix is stored as a mask, 64 bits for each [s, q], bit 4 j + i, least
significant first, and the values of the set bits in that order.
"""

import numpy as np

from vitoats.common.errors import InputError

STRIP = 16  # outputs
QUAD = 4  # inputs


def tiled(matrix: np.ndarray) -> np.ndarray:
    """Reorders a matrix [..., n, k] to [..., ceil(n / 16), ceil(k / 4), 16, 4]."""
    *others, n, k = matrix.shape
    padding = [(0, 0)] * len(others) + [(0, -n % STRIP), (0, -k % QUAD)]
    split = np.pad(matrix, padding).reshape(*others, -(-n // STRIP), STRIP, -(-k // QUAD), QUAD)
    return np.ascontiguousarray(np.swapaxes(split, -3, -2))


def untiled(tiles: np.ndarray, n: int, k: int) -> np.ndarray:
    """Restores the matrix [..., n, k] that ``tiled`` reordered."""
    *others, strips, quads, _, _ = tiles.shape
    padded = np.swapaxes(tiles, -3, -2).reshape(*others, strips * STRIP, quads * QUAD)
    return np.ascontiguousarray(padded[..., :n, :k])


def pack(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a matrix [n, k] into its non-zero values [nnz] and its mask uint8 [strips, quads, 8], in the order of tiles."""
    tiles = tiled(matrix)
    bits = (tiles != 0).reshape(*tiles.shape[:2], STRIP * QUAD)
    return tiles[tiles != 0], np.packbits(bits, axis=-1, bitorder="little")


def unpack(values: np.ndarray, mask: np.ndarray, n: int, k: int) -> np.ndarray:
    """Restores the matrix [n, k] that ``pack`` split.

    Raises:
        InputError: mask and values do not belong together, or not to that shape.
    """
    if mask.shape != (-(-n // STRIP), -(-k // QUAD), STRIP * QUAD // 8):
        raise InputError(f"a mask of shape {mask.shape} does not fit a matrix of shape {(n, k)}: the file is damaged")
    kept = np.unpackbits(mask, axis=-1, bitorder="little").astype(bool)
    if np.count_nonzero(kept) != values.size:
        raise InputError(f"a mask with {np.count_nonzero(kept)} bits comes with {values.size} values: the file is damaged")
    tiles = np.zeros(kept.shape, values.dtype)
    tiles[kept] = values
    return untiled(tiles.reshape(*mask.shape[:2], STRIP, QUAD), n, k)
