"""What the machine says of itself, and what stands for it where it does not."""

import os

import pytest

from vitoats.common import machine


@pytest.fixture
def silent(tmp_path, monkeypatch):
    """A machine that says nothing; the folder takes what it is to say."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "CACHES", tmp_path / "cache")
    return tmp_path


def test_the_processor_is_named_with_its_cores(silent):
    (silent / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU: 2 GHz\nmodel name\t: another\n")
    assert machine.processor() == f"Some CPU: 2 GHz, {os.cpu_count()} cores"


@pytest.mark.parametrize("cpuinfo", [None, "", "Features : fp asimd\n"])
def test_a_processor_without_a_name_goes_by_its_architecture(silent, cpuinfo):
    if cpuinfo is not None:
        (silent / "cpuinfo").write_text(cpuinfo)
    name, count = machine.processor().rsplit(", ", 1)
    assert name
    assert count == f"{os.cpu_count()} cores"


def test_the_largest_cache_is_the_last(silent):
    for i, size in enumerate(("48K", "32K", "2048K", "266240K")):
        (silent / f"cache/index{i}").mkdir(parents=True)
        (silent / f"cache/index{i}/size").write_text(size + "\n")
    assert machine.last_level_cache() == 260 * 2**20


def test_without_a_word_on_caches_it_is_32_mib(silent):
    assert machine.last_level_cache() == 32 * 2**20


def test_a_process_may_use_no_more_cores_than_there_are():
    assert 1 <= machine.cores() <= os.cpu_count()
