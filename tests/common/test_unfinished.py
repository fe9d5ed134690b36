"""Parts of a long measurement: kept until it is complete, ignored where they are damaged or another measurement's."""

import logging.handlers

import pytest

from vitoats.common import cache, unfinished
from vitoats.common.unfinished import Unfinished, remove_unfinished


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)


def test_parts_are_there_until_the_measurement_is_complete():
    first = Unfinished("m")
    first.add([[0.1, 2]])
    first.add([[1 / 3, 4], [5.0, 6]])
    second = Unfinished("m")
    assert second.parts == [[0.1, 2], [1 / 3, 4], [5.0, 6]]
    assert Unfinished("other").parts == []
    second.remove()
    assert Unfinished("m").parts == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[" * 10**5, b'{"sha256": "", "values": [[9]]}', b"\xff"])
def test_what_does_not_fit_is_ignored(damage):
    Unfinished("m").add([1])
    cache.cache_file("m.unfinished").write_bytes(damage)
    assert Unfinished("m").parts == []


def test_parts_of_another_measurement_are_ignored():
    Unfinished("m").add([1])
    cache.cache_file("m.unfinished").rename(cache.cache_file("n.unfinished"))
    assert Unfinished("n").parts == []


def test_a_folder_that_cannot_be_written_is_done_without_and_said_once(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = Unfinished("m")
    lines = logging.handlers.BufferingHandler(10)
    lines.setLevel(logging.WARNING)
    unfinished.log.addHandler(lines)
    found.add([1])
    found.add([2])
    unfinished.log.removeHandler(lines)
    assert found.parts == [1, 2]
    (said,) = lines.buffer
    assert said.getMessage().startswith("not kept: ")
    assert "output" not in said.getMessage()


def test_what_a_killed_writer_left_goes_with_the_parts(tmp_path):
    Unfinished("m").add([1])
    Unfinished("n", tmp_path / "own").add([2])
    for place in (cache.cache_file("m.unfinished"), tmp_path / "own" / "n.unfinished.json"):
        for left in ("lock", "writing"):
            place.with_name(f".{place.name}.{left}").touch()
    remove_unfinished("m")
    Unfinished("n", tmp_path / "own").remove()
    remove_unfinished("never begun")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
