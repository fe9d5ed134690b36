"""Finished blocks on disk: taken only where this run has put them, and made anew everywhere else."""

import json
import logging
import shutil

import pytest
import safetensors
import safetensors.torch
import torch

from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.compression.resume import STATE, BlockStore
from vitoats.methods.oats import OATSConfig

CONFIG = OATSConfig(compression=0.5, rank_ratio=0.25, iterations=6)
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def run(model, store=None, stop_at=None):
    made = []

    def progress(block, _n, what):
        if block == stop_at and what == "calibrating":
            raise KeyboardInterrupt
        if what == "calibrating" and block not in made:
            made.append(block)

    compress_in_place(model, IMAGES, job_of("oats", CONFIG), state=store, progress=progress)
    return made


@pytest.fixture(scope="module")
def whole():
    """The state of the model after a run that nothing interrupted."""
    model = make_tiny()
    run(model)
    return model.state_dict()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """What a run leaves that was stopped in its third block."""
    folder = tmp_path_factory.mktemp("state") / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        run(make_tiny(), BlockStore(folder, "same", resume=False), stop_at=2)
    return folder


@pytest.fixture
def left(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "out.partial")
    return tmp_path / "out.partial"


def file_of(folder, index):
    return folder / f"block_{index}.safetensors"


def contents(path):
    with safetensors.safe_open(str(path), "pt") as file:
        return {key: file.get_tensor(key).clone() for key in list(file.keys())}, file.metadata()


def nothing(_folder):
    pass


def copied(folder):
    shutil.copy(file_of(folder, 0), file_of(folder, 1))


def renamed(folder):
    file_of(folder, 0).rename(file_of(folder, 1))


def ahead(folder):
    shutil.copy(file_of(folder, 1), file_of(folder, 2))


def swapped(folder):
    first, second = (file_of(folder, i).read_bytes() for i in (0, 1))
    file_of(folder, 0).write_bytes(second)
    file_of(folder, 1).write_bytes(first)


def cut(folder):
    file_of(folder, 1).write_bytes(file_of(folder, 1).read_bytes()[:-10])


def emptied(folder):
    file_of(folder, 1).write_bytes(b"")


def one_value_changed(folder):
    tensors, metadata = contents(file_of(folder, 1))
    next(iter(tensors.values()))[0] += 1
    safetensors.torch.save_file(tensors, str(file_of(folder, 1)), metadata)


def a_layer_missing(folder):
    tensors, metadata = contents(file_of(folder, 1))
    kept = {key: value for key, value in tensors.items() if "mlp.fc2" not in key}
    safetensors.torch.save_file(kept, str(file_of(folder, 1)), metadata)


def figures_changed(folder):
    tensors, metadata = contents(file_of(folder, 1))
    rows = json.loads(metadata["values"])
    rows[0]["nonzeros"] = -5
    safetensors.torch.save_file(tensors, str(file_of(folder, 1)), metadata | {"values": json.dumps(rows)})


def no_digest(folder):
    tensors, metadata = contents(file_of(folder, 1))
    safetensors.torch.save_file(tensors, str(file_of(folder, 1)), {"rows": metadata["values"]})


def nested(folder):
    tensors, metadata = contents(file_of(folder, 1))
    safetensors.torch.save_file(tensors, str(file_of(folder, 1)), metadata | {"values": "[" * 100_000})


def from_another_run(folder):
    other = BlockStore(folder.parent / "other", "another", resume=False)
    with pytest.raises(KeyboardInterrupt):
        run(make_tiny(), other, stop_at=2)
    shutil.copy(file_of(other.folder, 1), file_of(folder, 1))


@pytest.mark.parametrize(
    ("damage", "made"),
    [
        (nothing, [2]),
        (copied, [1, 2]),
        (renamed, [0, 1, 2]),
        (ahead, [2]),
        (swapped, [0, 1, 2]),
        (cut, [1, 2]),
        (emptied, [1, 2]),
        (one_value_changed, [1, 2]),
        (a_layer_missing, [1, 2]),
        (figures_changed, [1, 2]),
        (no_digest, [1, 2]),
        (nested, [1, 2]),
        (from_another_run, [1, 2]),
    ],
)
def test_whatever_happens_to_kept_blocks_the_result_is_that_of_a_whole_run(left, whole, caplog, damage, made):
    damage(left)
    model = make_tiny()
    with caplog.at_level(logging.WARNING, "vitoats"):
        logging.getLogger("vitoats").addHandler(caplog.handler)
        assert run(model, BlockStore(left, "same", resume=True)) == made
        logging.getLogger("vitoats").removeHandler(caplog.handler)
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    assert ("is made anew" in caplog.text) == (damage is not nothing)
    assert run(make_tiny(), BlockStore(left, "same", resume=True)) == []  # what was made anew is kept in its place


def test_a_block_of_other_layers_is_made_anew(left):
    """As after an update, by which another choice of layers would come out of the same settings."""
    store = BlockStore(left, "same", resume=True)
    layers, rows, norms = store.load(0, [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")])
    assert len(layers) == len(rows) == 4
    assert norms == {}
    assert store.load(0, ["blocks.0.attn.qkv"]) is None


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"fingerprint": "same"}'])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_without_a_finished_block_is_begun_anew(tmp_path, content, resume):
    """A full disk may have left the first file empty."""
    (tmp_path / "state").mkdir()
    if content is not None:
        (tmp_path / "state" / STATE).write_bytes(content)
    store = BlockStore(tmp_path / "state", "same", resume)
    with pytest.raises(KeyboardInterrupt):
        run(make_tiny(), store, stop_at=1)
    assert run(make_tiny(), BlockStore(tmp_path / "state", "same", resume=True)) == [1, 2]


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[" * 100_000, b'{"fingerprint": "same"}', b"\xff"])
@pytest.mark.parametrize(("fingerprint", "made"), [("same", [2]), ("another", [0, 1, 2])])
def test_blocks_without_their_fingerprint_are_checked_one_by_one(left, content, fingerprint, made, caplog):
    (left / STATE).write_bytes(content)
    with caplog.at_level(logging.WARNING, "vitoats"):
        logging.getLogger("vitoats").addHandler(caplog.handler)
        assert run(make_tiny(), BlockStore(left, fingerprint, resume=True)) == made
        logging.getLogger("vitoats").removeHandler(caplog.handler)
    assert f"{STATE} is damaged" in caplog.text
    assert run(make_tiny(), BlockStore(left, fingerprint, resume=True)) == []
