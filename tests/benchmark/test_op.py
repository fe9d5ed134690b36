"""A grid of products: a row for each, and rates that follow from its times."""

import itertools

import pytest

from vitoats.benchmark.op import Grid, Tokens, time_products


@pytest.mark.parametrize(("float16", "rank"), [(False, 2), (True, 0)])
def test_all_combinations_are_timed(small_cache, float16, rank):
    tokens = [Tokens(1, 3), Tokens(2, 9)]
    grid = Grid(
        shapes=[(24, 40), (16, 8)], tokens=tokens, threads=[1, 2], zeros=[50.0, 75.0], patterns=["row", "layer"], rank=rank
    )
    said = []
    rows = time_products(grid, 100.0, float16, progress=lambda done, total, what: said.append((done, total, what)))
    found = [(row.threads, row.n, row.k, row.batch, row.zeros, row.pattern) for row in rows]
    assert found == [
        (t, n, k, batch, z, p)
        for t, (n, k), batch, z, p in itertools.product(
            (1, 2), ((24, 40), (16, 8)), ("3", "2x9"), (50.0, 75.0), ("row", "layer")
        )
    ]
    assert {row.tokens for row in rows} == {3, 18}
    assert {row.rank for row in rows} == {rank}
    assert [done for done, _, _ in said] == list(range(8))
    assert said[1] == (1, 8, "24x40, 2x9 tokens, 1 threads")


def test_rates_follow_from_the_times(small_cache):
    grid = Grid(shapes=[(64, 96)], tokens=[Tokens(4, 50)], threads=[2], zeros=[50.0], patterns=["row"])
    (row,) = time_products(grid, peak_gflops=50.0)
    gflops = 2 * (64 * 96 / 2) * 200 / (row.sparse_ms / 1e3) / 1e9
    assert row.nnz_gflops == pytest.approx(gflops, rel=0.02, abs=0.01)
    assert row.fma_share == pytest.approx(100 * gflops / (2 * 50), rel=0.02, abs=0.1)
    assert row.speedup == pytest.approx(row.dense_ms / row.sparse_ms, rel=0.02, abs=1e-3)
    assert row.native_int8_speedup == pytest.approx(row.int8_ms / row.native_int8_ms, rel=0.02, abs=1e-3)
    assert row.sparse_int8_speedup == pytest.approx(row.int8_ms / row.sparse_int8_ms, rel=0.02, abs=1e-3)
