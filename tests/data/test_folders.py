"""Images are found once each, with timm's classes, and nothing that is left out goes unsaid."""

import os
import re
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.conftest import write_image
from vitoats.data.folders import find_images
from vitoats.data.images import open_images

from timm.data.readers.reader_image_folder import ReaderImageFolder  # isort: skip


def touch(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def found_in(root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in find_images(root).paths]


NAMES = st.sampled_from(["a", "b", "C", "a2", "a10", "9", "10", "z"])  # names that differ in case alone have no order in timm


@settings(max_examples=30, deadline=None)
@given(st.sets(st.tuples(NAMES, st.lists(NAMES, max_size=2).map(tuple), NAMES), min_size=1))
def test_order_and_numbers_are_timms(files):
    with tempfile.TemporaryDirectory() as folder:
        touch(Path(folder), *("/".join([first, *inside, f"{name}.png"]) for first, inside, name in files))
        found = find_images(Path(folder))
        timms = ReaderImageFolder(folder)
        assert dict(zip(found.paths, found.labels, strict=True)) == dict(timms.samples)
        assert {name: i for i, name in enumerate(found.classes)} == timms.class_to_idx


def test_one_file_counts_once(tmp_path):
    touch(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "up").symlink_to("..")
    (tmp_path / "0first").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "again.png").symlink_to(tmp_path / "a" / "1.png")
    assert found_in(tmp_path) == ["a/1.png", "a/2.png", "b/3.png"]
    found = find_images(tmp_path)
    assert found.classes == ("a", "b")
    assert [os.path.relpath(path, tmp_path) for path in found.again] == ["b/again.png"]


def test_links_to_other_places_count(tmp_path):
    touch(tmp_path, "store/x.png", "store/y.png", "store/more/z.png", "data/b/1.png")
    (tmp_path / "data" / "a").mkdir()
    for name in "xy":
        (tmp_path / "data" / "a" / f"{name}.png").symlink_to(tmp_path / "store" / f"{name}.png")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "store" / "more")
    assert found_in(tmp_path / "data") == ["a/x.png", "a/y.png", "b/1.png", "c/z.png"]


def test_the_linked_folder_itself_may_be_given(tmp_path):
    touch(tmp_path, "store/a/x.png")
    (tmp_path / "data").symlink_to(tmp_path / "store")
    assert found_in(tmp_path / "data") == ["a/x.png"]


def test_links_that_lead_nowhere_and_empty_folders_are_no_images(tmp_path):
    touch(tmp_path, "a/1.png", "c/1.png")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "a" / "3.png").symlink_to("3.png")
    (tmp_path / "b").mkdir()
    found = find_images(tmp_path)
    assert found.classes == ("a", "c")
    assert sorted(map(os.path.basename, found.unreachable)) == ["2.png", "3.png"]
    assert list(map(os.path.basename, found.empty)) == ["b"]


@pytest.mark.parametrize(
    ("files", "split", "said"),
    [
        (("a/1.png", "2.png", "3.png"), "test", r"no class: 2 \(.*2.png, .*3.png\)"),  # beside class folders
        (("a/1.png", "b/notes.txt"), "test", "folders in .* without images"),
        (("train/a/1.png", "val/a/1.png", "loose.png"), "train", "only the folder train is read.*loose.png"),
        (("train/1.png", "boat/1.png", "car/1.png"), "train", "only the folder train is read.*boat, car"),
    ],
)
def test_what_is_left_out_is_said(tmp_path, caplog, files, split, said):
    for file in files:
        if file.endswith(".png"):
            write_image(tmp_path / file, 0)
        else:
            touch(tmp_path, file)
    with caplog.at_level("WARNING", "vitoats"):
        assert len(open_images(str(tmp_path), split, lambda image: image)) == 1
    assert re.search(said, caplog.text)


def test_other_splits_go_without_saying(tmp_path, caplog):
    touch(tmp_path, "train/a/1.png", "val/a/1.png", "README.md")
    with caplog.at_level("WARNING", "vitoats"):
        open_images(str(tmp_path), "train", lambda image: image)
    assert not caplog.records
