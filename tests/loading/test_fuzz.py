"""Whatever is done to files: they are opened, or one line says what is wrong with them, and nothing else comes out."""

import json
import shutil
import time
from pathlib import Path

import pytest
import safetensors.torch

import vitoats
from tests.conftest import make_tiny
from tests.loading.fuzz_files import KINDS, Fuzzer
from vitoats.common.errors import InputError
from vitoats.data.transforms import Preprocessing
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.loaded import LoadedModel


@pytest.fixture(scope="module")
def fuzzers(tmp_path_factory):
    """One for each kind, made when it is asked for."""
    scratch, made = tmp_path_factory.mktemp("fuzz"), {}

    def of(kind: str) -> Fuzzer:
        if kind not in made:
            made[kind] = Fuzzer(kind, scratch)
        return made[kind]

    return of


@pytest.mark.filterwarnings("ignore")  # of libraries, about what they find in a file
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_loaded_or_refused(fuzzers, kind):
    for seed in range(20):
        fuzzers(kind).case(seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_many_more_damaged_files_are_loaded_or_refused(fuzzers, kind):
    """As many as a few seconds of processor time allow; python -m tests.loading.fuzz_files opens as many as you like."""
    fuzzer, seed, start = fuzzers(kind), 1000, time.process_time()
    while time.process_time() - start < 6:
        fuzzer.case(seed)
        seed += 1


@pytest.fixture(scope="module")
def folder(fuzzers) -> Path:
    """A tiny compressed backbone of one block, with a head; without a checksum."""
    return fuzzers("compressed").sound


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
