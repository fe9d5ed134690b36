"""Shared fixtures: a tiny vision transformer as a timm folder, small image folders, and commands that run in this process."""

import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from tests.jobs import small_job
from vitoats.cli import common
from vitoats.cli.compress import main as compress

import timm  # isort: skip
from timm.models import save_for_hf  # isort: skip

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 4}


# The matrices here are small, and threads that wait for each other cost more than they save; in the processes of tests, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = ("test_slow.py::test_demo", "test_slow_native.py", "test_shipping.py")


def pytest_collection_modifyitems(items):
    """The longest tests come first, or one process would end with them while the others have nothing left to do."""
    items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))


def undo_logging() -> None:
    """Undoes what a command sets up, so that pytest gets each message, and once."""
    common.log.handlers.clear()
    common.log.setLevel(logging.NOTSET)
    common.log.propagate = True


@pytest.fixture(autouse=True)
def _logging():
    undo_logging()  # of a command that a fixture or an earlier test ran


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Measurements of tests do not go into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def heed_ctrl_c() -> None:
    """For ``preexec_fn``: a shell starts what runs in the background, such as these tests, with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def make_tiny(depth: int = 3) -> torch.nn.Module:
    """A ViT with random weights that differ from block to block: width 48, 32 px, 4 classes."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY | {"depth": depth}).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def tiny() -> torch.nn.Module:
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny model as timm saves one; ``local-dir:<folder>`` loads it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_for_hf(make_tiny(), str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def shallow_folder(tmp_path_factory) -> Path:
    """The tiny model with one block instead of three, for tests that export many files: tracing takes the time."""
    folder = tmp_path_factory.mktemp("shallow") / "model"
    save_for_hf(make_tiny(depth=1), str(folder), safe_serialization=True)
    return folder


def write_image(path: Path, seed: int, size: int = 40) -> None:
    """A noise image whose colour depends on the seed."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 128, (size, size, 3)) + random.integers(0, 127, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory) -> Path:
    """4 classes with 6 images each, one folder a class."""
    root = tmp_path_factory.mktemp("tree")
    for i in range(24):
        write_image(root / f"class{i % 4}" / f"{i:02}.png", i)
    return root


@pytest.fixture(scope="session")
def flat_images(tmp_path_factory) -> Path:
    """20 images in one folder."""
    root = tmp_path_factory.mktemp("flat")
    for i in range(20):
        write_image(root / f"{i:02}.jpg", i)
    return root


@pytest.fixture
def call(capsys):
    """Runs a command in this process: (exit status, stdout, stderr)."""

    def run(main, *argv):
        capsys.readouterr()
        status = common.run(main, [str(a) for a in argv])
        out, err = capsys.readouterr()
        undo_logging()  # its stream is this test's
        assert "Traceback" not in out + err
        return status, out, err

    return run


@pytest.fixture
def succeed(call):
    """Runs a command that must succeed; gives its JSON line."""

    def run(main, *argv):
        status, out, err = call(main, *argv)
        assert status == 0, err
        return json.loads(out.splitlines()[-1])

    return run


@pytest.fixture
def refuse(call):
    """Runs a command that must be refused with exit status 2 and one line on stderr; gives that line."""

    def run(main, *argv, warnings=False):
        status, out, err = call(main, *argv, "--quiet")
        assert (status, out) == (2, ""), err
        *before, last = err.splitlines()
        assert last.startswith("error: ")
        assert warnings or before == []
        assert len(last) < 700
        return last

    return run


@pytest.fixture
def job(tiny_folder, flat_images, tmp_path):
    """A small compression to tmp_path/out."""
    return small_job(tiny_folder, flat_images, tmp_path / "out")


@pytest.fixture(scope="session")
def plain(tiny_folder, flat_images, tmp_path_factory):
    """What the job gives without further flags."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert common.run(compress, small_job(tiny_folder, flat_images, folder)) == 0
    return folder


@pytest.fixture
def small_cache(monkeypatch):
    """A cache so small that few copies of a product's weights exceed it."""
    monkeypatch.setattr("vitoats.benchmark.products.last_level_cache", lambda: 10_000)
