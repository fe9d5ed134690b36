"""Matrix factorizations of torch, with as many CPU threads as they are worth.

LAPACK's threads wait for each other in a loop. On small matrices they take longer than a single thread, and beside another busy
process up to 200 times as long, because one thread waits while the other one has no core.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

WORTH_ALL_THREADS = 2**31  # multiply-adds, up to which a second thread gains less than a third, or loses

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def threads_for(multiply_adds: float) -> Iterator[None]:
    """In this context torch uses one thread, unless the work is worth all of them."""
    threads = torch.get_num_threads()
    if threads == 1 or multiply_adds >= WORTH_ALL_THREADS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sized(call: Callable[P, R]) -> Callable[P, R]:
    """The same function of one or more matrices [..., m, n], with threads by the size of the first one."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        m, n = first.shape[-2:]
        with threads_for(m * n * min(m, n)):
            return call(*args, **kwargs)

    return run


qr, svd = sized(torch.linalg.qr), sized(torch.linalg.svd)
eigh, eigvalsh = sized(torch.linalg.eigh), sized(torch.linalg.eigvalsh)
cholesky_ex, cholesky_inverse = sized(torch.linalg.cholesky_ex), sized(torch.cholesky_inverse)
cholesky_solve, solve_triangular = sized(torch.cholesky_solve), sized(torch.linalg.solve_triangular)
inv, lu_factor, lu_solve = sized(torch.linalg.inv), sized(torch.linalg.lu_factor), sized(torch.linalg.lu_solve)
