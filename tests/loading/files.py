"""Model files for tests of loading: as they should be, wrapped, damaged and hostile."""

import os
import pickle
import shutil
from argparse import Namespace

import pytest
import safetensors.torch
import torch

from tests.conftest import make_tiny
from vitoats.common.errors import InputError
from vitoats.loading.load import load_model


@torch.inference_mode()
def outputs(model, img_size=32):
    return model.eval()(
        torch.randn(1 if img_size > 300 else 2, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))
    )


def refusal(name, **settings) -> str:
    """The message of the error that loading raises; always one line."""
    with pytest.raises(InputError) as error:
        load_model(name, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def edited(folder, target, edit):
    """A copy of a model folder whose tensors went through ``edit``."""
    shutil.copytree(folder, target)
    state = safetensors.torch.load_file(str(target / "model.safetensors"))
    edit(state)
    safetensors.torch.save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    return target


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WRAPPINGS = {
    "plain": lambda s: s,
    "under state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "under model": lambda s: {"model": s, "epoch": 3},
    "module. prefixes": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled prefixes": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "EMA goes first": lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
    "EMA with prefixes": lambda s: {
        "state_dict": {f"module.{k}": v + 1 for k, v in s.items()},
        "state_dict_ema": {f"module.{k}": v for k, v in s.items()},
        "args": Namespace(lr=0.1),
    },
}


def write_checkpoint(state, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, str(path))
    else:
        torch.save(state, path)
    return path


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_bad(kind, path, marker):
    if kind == "code in a zip":
        torch.save({"weight": Evil(marker)}, path)
    elif kind == "code in an old pickle":
        path.write_bytes(pickle.dumps(Evil(marker), protocol=2))
    elif kind == "code in a new pickle":
        path.write_bytes(pickle.dumps(Evil(marker), protocol=4))
    elif kind == "a whole module":
        torch.save(make_tiny(), path)
    elif kind == "cut short":
        torch.save(make_tiny().state_dict(), path)
        cut(path)
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    elif kind == "no tensors":
        torch.save({"a": 1}, path)
    else:
        torch.save({"an empty dict": {}, "a list": [1, 2, 3], "text": "hello"}[kind], path)


BAD_FILES = (
    "code in a zip", "code in an old pickle", "code in a new pickle", "a whole module", "cut short", "empty file", "noise",
    "no tensors", "an empty dict", "a list", "text",
)  # fmt: skip
