"""What a run reads is noted by name, and a repeated run refuses other inputs before it works."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitoats.common.errors import InputError
from vitoats.common.noted import note, noting

DIGESTS = st.dictionaries(st.text("abc", max_size=2), st.text("01", min_size=1, max_size=2), max_size=4)


def test_nothing_is_computed_where_nothing_is_noted():
    note(lambda: pytest.fail("computed"))


@given(st.lists(DIGESTS, max_size=4))
def test_the_same_inputs_pass_and_others_are_named(runs):
    with noting({}) as found:
        for digests in runs:
            note(lambda digests=digests: digests)
    with noting(found) as again:
        for digests in runs:
            note(lambda digests=digests: digests)
    assert again == found
    for name in found:
        with noting(found), pytest.raises(InputError, match=f"first run: {name};"):
            note(lambda name=name: {name: "another"})
    with noting(found) as more:
        note(lambda: {"a new one": "0"})
    assert more == {"a new one": ["0"]}


def test_all_that_differ_are_in_one_line():
    with noting({"a": ["1"], "b": ["1"], "c": ["1"]}), pytest.raises(InputError, match="first run: a, c;"):
        note(lambda: {"a": "2", "b": "1", "c": "3"})
