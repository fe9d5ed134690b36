"""Parts of a long measurement: kept until it is complete, ignored where they are damaged or another measurement's."""

import pytest

from vitoats.common import cache, unfinished
from vitoats.common.unfinished import Unfinished


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


def test_a_folder_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = Unfinished("m")
    found.add([1])
    assert found.parts == [1]
