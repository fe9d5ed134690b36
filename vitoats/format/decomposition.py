"""One weight matrix as a sparse and a low-rank term."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """W ~ W' = S + U V, for one weight matrix [d_out, d_in].

    Attributes:
        S: [d_out, d_in], the sparse term with explicit zeros.
        U: [d_out, r].
        V: [r, d_in].
        objective: the output error. Where the method knows H it is the true one, tr((W - W') H (W - W')^T) =
            ||X (W - W')^T||_F^2 / n_tokens; where it knows the diagonal alone, ||(W - W') D||_F^2 with
            D = diag(sqrt(second_moment)), which leaves out how inputs correlate.
        relative_error: the root of objective over the same figure for W itself: ||X (W - W')^T||_F / ||X W^T||_F, or
            ||(W - W') D||_F / ||W D||_F.
        steps: how many iterations were taken; 1 for a method without.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    objective: float
    relative_error: float
    steps: int
