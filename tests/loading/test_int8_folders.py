"""Folders with int8 weights are untrusted data like all others: what does not belong together is refused in one line."""

import json

import pytest
import safetensors.torch
import torch

from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.common.errors import InputError
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.load import from_memory, load_model
from vitoats.methods.oats import OATSConfig

QKV, PATCH = "blocks.0.attn.qkv", "patch_embed.proj"


@pytest.fixture(params=[0.5, 0.0], ids=["sparse", "dense"])
def folder(request, tmp_path):
    loaded = from_memory(make_tiny())
    job = job_of("oats", OATSConfig(compression=request.param, iterations=2), int8=True)
    report = compress_in_place(loaded.timm_model, torch.randn(4, 3, 32, 32), job)
    save_checkpoint(loaded, tmp_path / "out", report.to_dict())
    return tmp_path / "out"


def edit(folder, change):
    """Changes the tensors of a folder, and leaves its checksum out."""
    tensors = {name: value.clone() for name, value in safetensors.torch.load_file(str(folder / "model.safetensors")).items()}
    change(tensors)
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in tensors.items()}, str(folder / "model.safetensors")
    )
    about = json.loads((folder / "vitoats.json").read_text())
    del about["tensors_sha256"]
    (folder / "vitoats.json").write_text(json.dumps(about))


def each_scale(change):
    def edited(tensors):
        for name in [name for name in tensors if name.endswith(".scale")]:
            change(tensors, name)

    return edited


CHANGES = {
    "no scales": each_scale(lambda t, name: t.pop(name)),
    "scales that are not finite": each_scale(lambda t, name: t[name].fill_(float("nan"))),
    "infinite scales": each_scale(lambda t, name: t[name].fill_(float("inf"))),
    "scales of another type": each_scale(lambda t, name: t.update({name: t[name].double()})),
    "whole scales": each_scale(lambda t, name: t.update({name: t[name].int()})),
    "too many scales": each_scale(lambda t, name: t.update({name: torch.cat([t[name]] * 2)})),
    "unsigned weights": lambda t: t.update({n: v.view(torch.uint8) for n, v in t.items() if v.dtype == torch.int8}),
    "wider weights": lambda t: t.update({n: v.int() for n, v in t.items() if v.dtype == torch.int8}),
    "float weights": lambda t: t.update({n: v.float() for n, v in t.items() if v.dtype == torch.int8}),
    "a scale of no layer": lambda t: t.update({"nowhere.weight.scale": torch.ones(4)}),
    "a scale of a block": lambda t: t.update({"blocks.weight.scale": torch.ones(4)}),
    "a scale of a convolution": lambda t: t.update({f"{PATCH}.weight.scale": torch.ones(48)}),
    "a scale of a float layer": lambda t: t.update({"head.weight.scale": torch.ones(4)}),
    "both forms of a layer": lambda t: t.update(
        {
            **{f"{QKV}.weight": torch.zeros(144, 48, dtype=torch.int8), f"{QKV}.weight.scale": torch.ones(144)},
            **{f"{QKV}.S.values": torch.zeros(0, dtype=torch.int8), f"{QKV}.S.scale": torch.ones(144)},
        }
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tensors_that_do_not_belong_together_are_refused(folder, change):
    edit(folder, change)
    with pytest.raises(InputError, match="is no whole compressed model") as error:
        load_model(str(folder))
    assert len(str(error.value).splitlines()) == 1


def test_damage_is_detected(folder):
    about = (folder / "vitoats.json").read_text()

    def flip(tensors):
        next(value for value in tensors.values() if value.dtype == torch.int8 and value.numel()).view(-1)[0] += 1

    edit(folder, flip)
    load_model(str(folder))  # nothing is wrong but the checksum
    (folder / "vitoats.json").write_text(about)
    with pytest.raises(InputError, match="checksum"):
        load_model(str(folder))


def test_scales_of_any_finite_value_are_loaded(folder):
    edit(folder, each_scale(lambda t, name: t[name].neg_()))
    model = load_model(str(folder)).model
    assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()
