"""The published formula of OWL."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vitoats.allocation.owl import LEAST, MOST, owl


def test_owl_by_hand():
    blocks = [{f"blocks.{block}.{layer}": 1000 for layer in ("attn.qkv", "mlp.fc2")} for block in range(3)]
    budgets = owl([0.01, 0.03, 0.02], blocks, 0.6, spread=0.08)
    density = np.array([0.0, 0.16, 0.08]) - 0.08 + 0.4
    for block in range(3):
        for layer in ("attn.qkv", "mlp.fc2"):
            assert budgets[f"blocks.{block}.{layer}"]["compression"] == pytest.approx(1 - density[block])
    same = owl([0.02, 0.02, 0.02], blocks, 0.6)
    assert all(b["compression"] == pytest.approx(0.6) for b in same.values())


@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 10**7)), min_size=1, max_size=24),
    st.floats(0.3, 0.8) | st.floats(0, 0.999),
)
@example([(0.1, 1000), (0.0, 1000), (0.01, 1000)], 0.97)
@example([(0.1, 1000), (0.0, 1000), (0.01, 1000)], 0.005)
def test_the_mean_over_all_weights_is_what_was_asked_for(blocks, compression):
    """Also where blocks are at the end of what they may lose."""
    budgets = owl([share for share, _ in blocks], [{str(i): size} for i, (_, size) in enumerate(blocks)], compression)
    removed = sum(size * budgets[str(i)]["compression"] for i, (_, size) in enumerate(blocks))
    assert removed / sum(size for _, size in blocks) == pytest.approx(compression)
    most = max(range(len(blocks)), key=lambda i: blocks[i][0])
    assert budgets[str(most)]["compression"] == min(budget["compression"] for budget in budgets.values())
    assert all(min(LEAST, compression) <= b["compression"] <= max(MOST, compression) for b in budgets.values())
