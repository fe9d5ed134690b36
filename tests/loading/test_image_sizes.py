"""Sizes of images that a model does not take are refused with those that it does."""

import pytest

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError
from vitoats.loading.load import from_memory, load_model

import timm  # isort: skip

VIT = {"embed_dim": 48, "depth": 1, "num_heads": 3}
SMALL = {
    "xcit_nano_12_p16_224": VIT,
    "hiera_tiny_224": {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "maxvit_pico_rw_256": {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)},
    "naflexvit_base_patch16_gap": VIT,
}


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("xcit_nano_12_p16_224", 40, "`patch_size` should divide"),
        ("hiera_tiny_224", 50, "a multiple of 32, or 224"),
        ("maxvit_pico_rw_256", 50, "a multiple of 32, or 256"),
        ("naflexvit_base_patch16_gap", 40, "a multiple of 16, or 384"),
    ],
)
def test_a_size_that_does_not_fit(name, wrong, right, monkeypatch):
    small = SMALL[name]
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **{**small, **kwargs}))
    with pytest.raises(InputError, match=right):
        load_model(name, random_weights=True, img_size=wrong)
    assert load_model(name, random_weights=True, img_size=64).preprocessing.img_size == 64


def test_no_multiples_are_named_that_the_published_size_is_not():
    with pytest.raises(InputError, match=r"give `img_size` 240$"):  # whose branches have other patch sizes
        load_model("crossvit_tiny_240", random_weights=True, img_size=64)


def test_a_model_in_memory_that_was_made_for_another_size():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **VIT).eval()
    with pytest.raises(InputError, match=r"requires .32, 32"):
        from_memory(model, img_size=48)


def test_a_size_that_fits_is_taken_though_it_was_not_published():
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)).eval()
    assert from_memory(model, img_size=50).preprocessing.img_size == 50
