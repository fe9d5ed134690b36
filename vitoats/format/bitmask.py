"""The bit mask of a sparse matrix: one bit per entry, packed along each row, least significant bit first.

A mask of [n_rows, n_columns] becomes uint8 [n_rows, ceil(n_columns / 8)]; the bits past the last column are zero. Checkpoints
and the ONNX operator ``SparseMatMul`` both store a sparse matrix as this mask and its values in row order.
"""

import numpy as np

from vitoats.common.errors import InputError


def pack(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a matrix [n, k] into its non-zero values [nnz], in row order, and its mask uint8 [n, ceil(k / 8)]."""
    kept = matrix != 0
    return np.ascontiguousarray(matrix[kept]), np.packbits(kept, axis=1, bitorder="little")


def packed_bytes(d_out: int, d_in: int, values: int, each: int = 4) -> int:
    """Bytes of the mask of a [d_out, d_in] matrix and of its ``values``, which take 4 bytes each (float32), or 1 (int8)."""
    return each * values + d_out * -(-d_in // 8)


def saves(d_out: int, d_in: int, values: int, each: int = 4) -> bool:
    """Whether the mask and the values take fewer bytes than the dense matrix [d_out, d_in]."""
    return packed_bytes(d_out, d_in, values, each) < each * d_out * d_in


def unpack(values: np.ndarray, mask: np.ndarray, n_columns: int) -> np.ndarray:
    """Restores the matrix [n, n_columns] that ``pack`` split.

    Raises:
        InputError: mask and values do not belong together.
    """
    if mask.ndim != 2 or mask.shape[1] != -(-n_columns // 8):
        raise InputError(f"a mask of shape {tuple(mask.shape)} does not fit {n_columns} columns: the file is damaged")
    bits = np.unpackbits(mask, axis=1, bitorder="little")
    if bits[:, n_columns:].any():
        raise InputError("a mask has bits past its last column: the file is damaged")
    kept = bits[:, :n_columns].astype(bool)
    if np.count_nonzero(kept) != values.size:
        raise InputError(f"a mask with {np.count_nonzero(kept)} bits comes with {values.size} values: the file is damaged")
    matrix = np.zeros(kept.shape, values.dtype)
    matrix[kept] = values
    return matrix
