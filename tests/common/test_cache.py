"""Caches give what was put there or have it made anew, whatever became of their files."""

import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from platformdirs import user_cache_path

from tests.conftest import make_tiny
from vitoats.allocation.lagrange import allocate
from vitoats.allocation.sensitivity import RATES, Sensitivity, read_sensitivities
from vitoats.common import cache
from vitoats.common.cache import cached, cached_tensors
from vitoats.common.fingerprint import json_sha256
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs

BLOCKS = adapt(make_tiny(), ImageInputs(32)).blocks
SIZES = [(x.name, x.module.weight.numel()) for block in BLOCKS for x in block.linears]
LAYERS = [
    Sensitivity(name, size, tuple(0.1 * (i + 1) * np.exp(-5 * (1 - rate)) for rate in RATES))
    for i, (name, size) in enumerate(SIZES)
]
ROWS = [asdict(layer) for layer in LAYERS]
BUDGETS = allocate(LAYERS, 0.5 * sum(s.parameters for s in LAYERS))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vitoats"


class Measurement:
    """Counts how often it is made."""

    def __init__(self, values):
        self.values, self.made = values, 0

    def __call__(self):
        self.made += 1
        return self.values


def sensitivities(make):
    return cached("k", lambda values: read_sensitivities(values, SIZES, False), make)


def budgets_of(make):
    found = sensitivities(make)
    return allocate(found, 0.5 * sum(s.parameters for s in found))


def test_a_measurement_is_kept(folder):
    make = Measurement(ROWS)
    assert sensitivities(make) == sensitivities(make) == LAYERS
    assert make.made == 1
    assert [p.name for p in folder.iterdir()] == ["k.json"]
    assert user_cache_path("vitoats", appauthor=False) == folder


def test_what_a_killed_writer_has_left_goes_with_the_next_reader(folder):
    sensitivities(Measurement(ROWS))
    for word in ("lock", "writing"):
        (folder / f".k.json.{word}").touch()
    sensitivities(Measurement(ROWS))
    assert [p.name for p in folder.iterdir()] == ["k.json"]


def test_another_name_is_another_measurement(folder):
    cached("a", lambda values: values, lambda: [1])
    (folder / "a.json").rename(folder / "b.json")
    assert cached("b", lambda values: values, lambda: [2]) == [2]
    assert cached("b", lambda values: values, lambda: [3]) == [2]


WHOLE = json.dumps(ROWS)
DAMAGED = {
    "empty": b"",
    "an empty list": b"[]",
    "an empty object": b"{}",
    "null": b"null",
    "a number": b"3",
    "cut": WHOLE.encode()[:-20],
    "no text": b"\xff\xfe\x00",
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"values":' * 50_000,
    "as it was kept before there were digests": WHOLE.encode(),
    "a digest without values": b'{"sha256": "x"}',
    "values without a digest": json.dumps({"values": ROWS}).encode(),
    "a digest of something else": json.dumps({"sha256": json_sha256(["k", []]), "values": ROWS}).encode(),
    "a digest that is no text": json.dumps({"sha256": [1], "values": ROWS}).encode(),
    "NaN": b'{"sha256": NaN, "values": []}',
    "a number of 5000 digits": b'{"sha256": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_made_anew_with_a_line(folder, content, caplog):
    make = Measurement(ROWS)
    folder.mkdir()
    (folder / "k.json").write_bytes(content)
    assert budgets_of(make) == BUDGETS
    assert "made anew" in caplog.text
    assert budgets_of(make) == BUDGETS
    assert make.made == 1


def without(key):
    return [{k: v for k, v in row.items() if k != key} for row in ROWS]


def with_first(**values):
    return [ROWS[0] | values, *ROWS[1:]]


UNFIT = {
    "no rows": [],
    "an object": {},
    "a text": "rows",
    "rows that are no objects": [[] for _ in ROWS],
    "a row missing": ROWS[1:],
    "the last row missing": ROWS[:-1],
    "a row twice": [*ROWS, ROWS[0]],
    "a row in the place of another": [ROWS[1], *ROWS[1:]],
    "another order": ROWS[::-1],
    "a wrong name": with_first(name="blocks.0.attn.proj"),
    "a name that is a number": with_first(name=3),
    "no names": without("name"),
    "a negative count": with_first(parameters=-5),
    "a count of nothing": with_first(parameters=0),
    "a broken count": with_first(parameters=6912.5),
    "a count that is true": with_first(parameters=True),
    "another count": with_first(parameters=6913),
    "no errors": with_first(errors=[]),
    "errors missing": without("errors"),
    "too few errors": with_first(errors=[0.1]),
    "too many errors": with_first(errors=[0.1] * 5),
    "errors in lists": with_first(errors=[[0.1]] * 4),
    "errors in an object": with_first(errors={"0": 0.1}),
    "an error that is a text": with_first(errors=["0.1"] * 4),
    "a negative error": with_first(errors=[-0.1, 0.1, 0.2, 0.3]),
    "an error that is None": with_first(errors=[None, 0.1, 0.2, 0.3]),
    "an endless error": with_first(errors=[1e308 * 10, 0.1, 0.2, 0.3]),
    "an error that is too large": with_first(errors=[10**400, 0.1, 0.2, 0.3]),
    "a measurement that was not asked for": with_first(without_rank=0.1),
    "without_rank missing": without("without_rank"),
}


@pytest.mark.parametrize("values", UNFIT.values(), ids=UNFIT.keys())
def test_values_that_are_no_measurement_of_the_model_are_refused(folder, values):
    """Even under a digest that is right."""
    with pytest.raises(ValueError):  # noqa: PT011  (each has words of its own)
        read_sensitivities(values, SIZES, False)
    folder.mkdir()
    (folder / "k.json").write_text(json.dumps({"sha256": json_sha256(["k", values]), "values": values}))
    make = Measurement(ROWS)
    assert budgets_of(make) == BUDGETS
    assert make.made == 1


def test_what_a_goal_needs_must_have_been_measured():
    with pytest.raises(ValueError, match="without_rank"):
        read_sensitivities(ROWS, SIZES, True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_change_of_bytes_changes_budgets(folder, data):
    """Bytes replaced, inserted, deleted, repeated: at most it is measured again."""
    (folder / "k.json").unlink(missing_ok=True)
    budgets_of(Measurement(ROWS))
    content = bytearray((folder / "k.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 200)))
        content[start:end] = data.draw(
            st.one_of(
                st.binary(max_size=8), st.just(content[start:end] * 2), st.sampled_from([b"-", b"0", b"1e9", b"null", b"["])
            )
        )
    (folder / "k.json").write_bytes(content)
    assert budgets_of(Measurement(ROWS)) == BUDGETS


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_change_of_rows_changes_budgets(folder, data):
    """Rows taken out, doubled and moved about, and numbers replaced, in a file that is good JSON."""
    (folder / "k.json").unlink(missing_ok=True)
    budgets_of(Measurement(ROWS))
    held = json.loads((folder / "k.json").read_text())
    held["values"] = data.draw(st.lists(st.sampled_from(held["values"]), max_size=14))
    number = st.one_of(st.floats(allow_nan=False), st.integers(-10, 10), st.none())
    for row in held["values"]:
        if data.draw(st.booleans()):
            row[data.draw(st.sampled_from(["parameters", "without_rank"]))] = data.draw(number)
    (folder / "k.json").write_text(json.dumps(held))
    assert budgets_of(Measurement(ROWS)) == BUDGETS


def test_a_pipe_in_the_place_of_a_kept_file_keeps_nobody_waiting(folder):
    folder.mkdir()
    os.mkfifo(folder / "k.json")
    assert budgets_of(Measurement(ROWS)) == BUDGETS


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached("k", list, lambda: [1, 2]) == [1, 2]


def test_what_is_no_number_is_not_kept(folder):
    make = Measurement([float("nan")])
    for _ in range(2):
        cached("k", list, make)
    assert make.made == 2
    assert not (folder / "k.json").exists()


# ---- tensors


@pytest.mark.parametrize("damage", [b"", b"x", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_tensors_are_made_anew(tmp_path, damage):
    make = Measurement({"x": torch.arange(6.0).view(2, 3), "y": torch.arange(2)})
    path = tmp_path / "features.safetensors"
    for _ in range(2):
        found = cached_tensors(path, make)
        assert all(torch.equal(found[name], make.values[name]) for name in ("x", "y"))
    assert make.made == 1
    path.write_bytes(damage)
    assert torch.equal(cached_tensors(path, make)["x"], make.values["x"])
    assert make.made == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_change_of_a_byte_changes_tensors(tmp_path, data):
    make = Measurement({"x": torch.arange(6.0).view(2, 3)})
    path = tmp_path / "features.safetensors"
    path.unlink(missing_ok=True)
    cached_tensors(path, make)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.unlink()
    path.write_bytes(content)
    assert torch.equal(cached_tensors(path, make)["x"], make.values["x"])


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    cache.cached("k", list, lambda: [1])
    assert (tmp_path / ".cache/vitoats/k.json").is_file()
