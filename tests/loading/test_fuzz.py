"""Whatever is done to the files of a folder: it loads, or InputError says what is wrong with it, and nothing else comes out."""

import json
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import vitoats
from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.common.errors import InputError
from vitoats.data.transforms import Preprocessing
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.head_files import save_head
from vitoats.loading.load import load_model
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.models.heads import HeadInfo

VALUES = [
    None, True, False, 0, 1, 2, 3, 7, -1, 1.5, 0.0, -0.5, 1e308, 2**31, 2**62, 10**30, "", "x", "64", "blocks.0", "\x1b[31m",
    "é" * 300, [], {}, [[]], [1], [0, 0], [[48, 2]], [None], {"a": 1}, "NAN", "INFINITY",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny compressed backbone of one block, with a head; without a checksum, which would end most loads early."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fuzz") / "folder"
    model = make_tiny()
    model.blocks = model.blocks[:1]
    model._model_args["depth"] = 1
    model.reset_classifier(0)
    report = compress_in_place(model, torch.randn(4, 3, 32, 32), job_of("oats", OATSConfig(iterations=2)))
    save_checkpoint(LoadedModel("tiny", model, Preprocessing(32), "random weights"), path, report.to_dict())
    about = json.loads((path / "vitoats.json").read_text())
    del about["tensors_sha256"]
    (path / "vitoats.json").write_text(json.dumps(about))
    save_head(path / "head.safetensors", torch.randn(3, 96), torch.randn(3), HeadInfo("tiny", 32, classes=("a", "b", "c")))
    assert vitoats.load(path)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    return path


def places(value, path=()):
    """The path to each value inside a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def mutate_json(text: str, rng: random.Random) -> str:
    """Replaces, removes, renames or doubles a value, or changes a character."""
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(["", "{", "]", '"', "9", "e9", "\\", "\x00", ","]) + text[at + rng.randrange(2) :]
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        *parents, last = rng.choice([p for p in places(value) if p])
        inside = value
        for key in parents:
            inside = inside[key]
        way = rng.random()
        if way < 0.7:
            inside[last] = rng.choice(VALUES)
        elif way < 0.85:
            del inside[last]
        elif isinstance(inside, dict):
            inside[rng.choice(["x", "depth", "pretrained", "url", "num_heads", "blocks.0.mlp"])] = inside.pop(last)
        else:
            inside.append(inside[last])
    return json.dumps(value).replace('"NAN"', "NaN").replace('"INFINITY"', "1e999")


def mutate_tensors(content: bytes, rng: random.Random) -> bytes:
    """Changes the header as JSON, or bytes of header, length or tensors."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.6:
        header = mutate_json(content[8 : 8 + size].decode(), rng).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 10])):
        changed[rng.randrange(rng.choice([8, 8 + size, len(changed)]))] = rng.randrange(256)
    return bytes(changed[: rng.choice([len(changed), len(changed), rng.randrange(len(changed))])])


def check(folder: Path, target: Path, seed: int, prefix: str = "") -> bool:
    """Loads one mutant; whether it loaded."""
    rng = random.Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    names = ["vitoats.json", "config.json", "config.json", "model.safetensors", "head.safetensors"]
    file = target / rng.choice(names[1:4] if prefix else names)
    if file.suffix == ".json":
        file.write_text(mutate_json(file.read_text(), rng))
    else:
        file.write_bytes(mutate_tensors(file.read_bytes(), rng))
    message, model = "", None
    try:
        model = load_model(f"{prefix}{target}").model
    except InputError as error:
        message = str(error)
    assert message.isprintable(), seed  # on one line, that is
    assert len(message) < 1500, seed
    assert model is None or all(p.device.type == "cpu" for p in model.parameters()), seed
    return model is not None


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_mutated_folders_load_or_are_refused(folder, tmp_path, start):
    for seed in range(start, start + 50):
        check(folder, tmp_path / "mutant", seed)


@pytest.mark.parametrize("start", range(0, 100, 50))
def test_mutated_timm_folders_load_or_are_refused(tiny_folder, tmp_path, start):
    for seed in range(start, start + 50):
        check(tiny_folder, tmp_path / "mutant", seed, "local-dir:")


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 2500, 500))
def test_thousands_of_mutated_folders_load_or_are_refused(folder, tiny_folder, tmp_path, start):
    for seed in range(start, start + 500):
        check(folder, tmp_path / "mutant", seed)
        check(tiny_folder, tmp_path / "mutant", seed, "local-dir:")


def test_a_changed_byte_in_the_weights_is_found(tmp_path):
    """Of each tensor, with the checksum; the tensors themselves stay finite."""
    save_checkpoint(LoadedModel("tiny", make_tiny(), Preprocessing(32), "random weights"), tmp_path / "whole", {})
    content = (tmp_path / "whole" / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, tensor in header.items():
        if name != "__metadata__":
            changed = bytearray(content)
            changed[8 + size + tensor["data_offsets"][0]] ^= 1  # the last bit of a mantissa
            (tmp_path / "whole" / "model.safetensors").write_bytes(changed)
            with pytest.raises(InputError, match="checksum"):
                vitoats.load(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").write_bytes(content)
    vitoats.load(tmp_path / "whole")


def test_a_changed_byte_in_a_head_is_found(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "head.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        vitoats.load(tmp_path / "copy")
    state = safetensors.torch.load_file(str(file))
    safetensors.torch.save_file(state, str(file))  # without metadata: a head that anyone may write
    vitoats.load(tmp_path / "copy")
