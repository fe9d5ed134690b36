"""One comparison for all tests of this folder, and copies of it to break."""

import json
import shutil

import pytest

from tests.comparison.runs import flags
from tests.conftest import write_image
from vitoats.cli import common
from vitoats.cli.compare import main as compare


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    """Images of 4 classes: train with 24, val with 30 others."""
    root = tmp_path_factory.mktemp("data")
    for i in range(54):
        write_image(root / ("train" if i < 24 else "val") / f"class{i % 4}" / f"{i:02}.png", i)
    return root


@pytest.fixture(scope="package")
def photos(tmp_path_factory):
    """3 images of another kind and of other sizes."""
    root = tmp_path_factory.mktemp("photos")
    for i, size in enumerate((50, 64, 90)):
        write_image(root / f"{i}.png", 1000 + i, size)
    return root


@pytest.fixture(scope="package")
def compared(tiny_folder, data, photos, tmp_path_factory):
    """The whole comparison, once: its folder and what its JSON line said."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    line = folder.parent / "line.json"
    argv = [*flags(tiny_folder, data, folder), "--keep-models", f"--ood-dir={photos}", f"--results-file={line}"]
    assert common.run(compare, argv) == 0
    return folder, json.loads(line.read_text())


@pytest.fixture
def copied(compared, tmp_path):
    """A copy of that folder, to break."""
    shutil.copytree(compared[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def begun(copied):
    """A copy with the dense and the int8 row only."""
    shutil.rmtree(copied / "models")
    for file in (copied / "rows").iterdir():
        if file.stem not in ("dense", "int8"):
            file.unlink()
    return copied
