"""A measurement is made once; a cache that is damaged or cannot be written is done without."""

from dataclasses import asdict

from tests.allocation.layers import LAYERS
from vitoats.allocation.sensitivity import Sensitivity
from vitoats.common.cache import cached


def test_a_measurement_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return [asdict(s) for s in LAYERS]

    def read(rows):
        return [Sensitivity.from_json(row) for row in rows]

    assert cached("k", read, make) == LAYERS
    assert cached("k", read, make) == LAYERS
    assert len(made) == 1
    file = next((tmp_path / "vitoats").iterdir())
    file.write_text('[{"name": 3}')  # damaged: measured again
    assert cached("k", read, make) == LAYERS
    assert len(made) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached("k", list, lambda: [1, 2]) == [1, 2]
