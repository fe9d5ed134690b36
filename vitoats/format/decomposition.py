"""A weight matrix as the sum of a sparse and a low-rank term."""

from dataclasses import dataclass

from torch import Tensor, count_nonzero


@dataclass(frozen=True)
class Decomposition:
    """W ~ W' = S + U V, for one weight matrix [d_out, d_in].

    Attributes:
        S: [d_out, d_in], the sparse term with explicit zeros.
        U: [d_out, r].
        V: [r, d_in].
        objective: the output error. If the method knows H, this is the exact error, tr((W - W') H (W - W')^T) =
            ||X (W - W')^T||_F^2 / n_tokens. If it only knows the diagonal, this is ||(W - W') D||_F^2 with
            D = diag(sqrt(second_moment)), which ignores correlations between inputs.
        relative_error: the square root of objective, divided by the same quantity for W: ||X (W - W')^T||_F / ||X W^T||_F,
            or ||(W - W') D||_F / ||W D||_F.
        steps: number of iterations; 1 for a method that does not iterate.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    objective: float
    relative_error: float
    steps: int

    @property
    def kept_parameters(self) -> int:
        """nnz(S), and the elements of U and V."""
        return int(count_nonzero(self.S)) + self.U.numel() + self.V.numel()
