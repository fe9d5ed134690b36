"""A timm model that is in memory already becomes a LoadedModel like one of the same name."""

import pytest
import torch
from torch import nn

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.common.errors import InputError
from vitoats.data.transforms import Preprocessing
from vitoats.format.layers import compressed_layers
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.load import from_memory, load, load_model
from vitoats.methods.oats import OATSConfig

import timm  # isort: skip


def small(name="vit_tiny_patch16_224", **arguments):
    return timm.create_model(name, **{"depth": 1, **arguments})


def test_a_model_in_memory_is_described_as_one_of_its_name():
    found = from_memory(small())
    expected = load_model("vit_tiny_patch16_224", random_weights=True)
    assert found.preprocessing == expected.preprocessing
    assert found.name == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert (found.weights, found.about, found.n_classes) == ("given in memory", {}, 1000)
    assert from_memory(small(), name="mine").name == "mine"


def test_the_callers_model_stays_as_it_is():
    model = make_tiny().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = from_memory(model)
    compress_in_place(loaded.timm_model, torch.randn(4, 3, 32, 32), job_of("oats", OATSConfig(iterations=2)))
    assert compressed_layers(loaded.model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not compressed_layers(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_it_is_saved_and_loads_again(tmp_path):
    loaded = from_memory(make_tiny())
    save_checkpoint(loaded, tmp_path / "out", {"model": loaded.name})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / "out")(images), loaded.model(images))


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, 64),  # built for another size
        ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}, 64),
        ("deit3_small_patch16_224", {}, 224),
        ("convnext_atto", {}, 288),  # timm's test size
        ("vit_small_patch14_dinov2", {}, 518),
    ],
)
def test_the_image_size_is_that_of_the_model(name, arguments, size):
    arguments = arguments if name == "convnext_atto" else {"depth": 1, **arguments}
    assert from_memory(timm.create_model(name, **arguments)).preprocessing.img_size == size


def test_another_size_is_for_models_that_take_any():
    assert from_memory(timm.create_model("convnext_atto"), img_size=96).preprocessing.img_size == 96
    with pytest.raises(InputError, match="takes no such images"):
        from_memory(small(), img_size=96)


def test_preprocessing_may_be_given():
    own = Preprocessing(32, 1.0, "squash", mean=(0.5, 0.5, 0.5))
    assert from_memory(make_tiny(), preprocessing=own).preprocessing == own
    with pytest.raises(InputError, match="`img_size`"):
        from_memory(make_tiny(), preprocessing=own, img_size=48)
    with pytest.raises(InputError, match="takes no such images"):
        from_memory(make_tiny(), preprocessing=Preprocessing(48))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(3, 3), "no timm model"),
        ("vit_tiny_patch16_224", "no timm model"),
        (None, "no timm model"),
        (small(img_size=32, in_chans=5), "1, 3 or 4"),
    ],
    ids=["module", "name", "nothing", "five channels"],
)
def test_what_cannot_be_taken_is_refused_in_one_line(model, said):
    with pytest.raises(InputError, match=said) as error:
        from_memory(model)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_refused():
    model = make_tiny()
    model.head.bias.data[0] = float("nan")
    with pytest.raises(InputError, match=r"head\.bias"):
        from_memory(model)
