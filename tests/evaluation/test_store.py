"""Rows of a comparison on disk; tests/comparison has those of the commands that use them."""

import pytest

from vitoats.common.errors import InputError
from vitoats.evaluation.store import RowStore


def test_a_folder_that_a_run_left_when_it_was_killed_at_its_beginning_is_taken(tmp_path):
    for word in ("lock", "writing"):
        (tmp_path / f".comparison.json.{word}").touch()
    RowStore(tmp_path, {"model": "m"})
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="exists and holds no comparison"):
        RowStore(tmp_path, {"model": "m"})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
