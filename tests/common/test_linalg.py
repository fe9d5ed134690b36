"""Factorizations with threads by size: their results are torch's, and small ones run with a single thread."""

import pytest
import torch

from vitoats.common import linalg


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_work_gets_one_thread_and_large_work_all(two_threads):
    with linalg.threads_for(10**6):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with linalg.threads_for(linalg.WORTH_ALL_THREADS):
        assert torch.get_num_threads() == 2


def test_the_threads_come_back_after_an_error(two_threads):
    with pytest.raises(torch.linalg.LinAlgError):
        linalg.inv(torch.zeros(3, 3))
    assert torch.get_num_threads() == 2


def test_a_factorization_runs_with_the_threads_that_its_size_is_worth(two_threads):
    seen = []
    watched = linalg.sized(lambda A: seen.append(torch.get_num_threads()))
    watched(torch.empty(64, 8))
    watched(torch.empty(5, 2048, 2048, device="meta"))
    assert seen == [1, 2]


def test_results_are_those_of_torch(two_threads):
    A = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).double()
    H = A.T @ A
    Q, R = linalg.qr(A)
    torch.testing.assert_close(Q @ R, A)
    torch.testing.assert_close(linalg.svd(A, full_matrices=False).S, torch.linalg.svdvals(A))
    torch.testing.assert_close(linalg.cholesky_solve(A.T, linalg.cholesky_ex(H).L), torch.linalg.solve(H, A.T))
