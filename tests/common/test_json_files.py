"""JSON of others: what Python's own reader takes and what it must not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitoats.common.errors import InputError, RunError
from vitoats.common.json_files import DEEPEST, parse_json, read_json, to_json

texts = st.text(st.characters(exclude_categories=("C",)), max_size=20)
numbers = st.integers(-(2**62), 2**62) | st.floats(-1e18, 1e18)
plain = st.recursive(
    st.none() | st.booleans() | numbers | texts, lambda x: st.lists(x) | st.dictionaries(texts, x), max_leaves=20
)


@given(value=plain)
def test_plain_values_are_read_as_they_were(value):
    assert parse_json(json.dumps(value)) == value
    assert to_json(value) == json.dumps(value)


def test_a_figure_that_is_no_number_is_not_written():
    result = {"top1": 50.0, "rows": [{"error": 0.1}, {"error": float("nan")}], "speedup": float("inf")}
    with pytest.raises(RunError, match=r"^rows\[1\].error, speedup is not finite"):
        to_json(result)


def test_figures_that_are_no_numbers_are_none():
    """Python writes them."""
    assert parse_json(json.dumps([float("nan"), float("inf"), -float("inf")])) == [None, None, None]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1,]", "{'a': 1}", '{"a": 1, "a": 2}', '[{"a": 1, "b": 2, "a": 1}]', "1e999", "-1e999", "1" * 30, "1" * 5000,
        '"\\u001b[31m"', '{"\\u0000": 1}', '"\\u009b"', "[" * 10**5, "[" * DEEPEST + "1" + "]" * DEEPEST,
    ],
    ids=range(15),
)  # fmt: skip
def test_all_else_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_depth_is_that_of_the_deepest_value():
    assert parse_json("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))
    assert parse_json('{"a": "line\\nline\\ttab"}') == {"a": "line\nline\ttab"}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"x" * (2**24 + 1), None])
def test_files_that_cannot_be_read_are_one_line(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json is damaged") as error:
        read_json(path)
    assert str(error.value).isprintable()
