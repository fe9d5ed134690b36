"""Proves that linear classifiers are found in any file, with what they were made for by width or name."""

import pytest
import torch

from tests.conftest import TINY
from vitoats.common.errors import InputError
from vitoats.loading.classifiers import Classifier, choose, features_of, find_classifiers
from vitoats.loading.head_files import HeadFile, attach_head
from vitoats.models.heads import features

import timm  # isort: skip

D, CLASSES = 48, 4


def tensors(tokens, prefix="", bias=True):
    made = {prefix + "weight": torch.randn(CLASSES, tokens * D)}
    return made | ({prefix + "bias": torch.randn(CLASSES)} if bias else {})


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 0, "depth": 5}).eval()


def attached(backbone, path, content, **settings):
    torch.save(content, path / "head.pth")
    return attach_head(backbone, HeadFile(path / "head.pth", **settings), source="tiny", img_size=32)


@pytest.mark.parametrize("prefix", ["", "linear.", "head.", "0.", "classifier.fc.", "module.linear."])
@pytest.mark.parametrize("place", [None, "state_dict", "model"])
def test_one_classifier_under_any_name(backbone, tmp_path, prefix, place):
    held = tensors(2, prefix)
    found = attached(backbone, tmp_path, held if place is None else {place: held, "epoch": 3})
    assert torch.equal(found.head.weight, held[prefix + "weight"])
    assert torch.equal(found.head.bias, held[prefix + "bias"])


@pytest.mark.parametrize(
    ("tokens", "layers", "patch_mean"),
    [(1, 1, False), (2, 1, True), (4, 4, False), (5, 4, True)],
)
def test_the_width_says_what_a_head_takes(backbone, tmp_path, tokens, layers, patch_mean):
    held = tensors(tokens)
    model = attached(backbone, tmp_path, held)
    assert (model.info.layers, model.info.patch_mean) == (layers, patch_mean)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = features(backbone, images, layers, patch_mean) @ held["weight"].T + held["bias"]
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_two_readings_of_a_width_are_asked_about(backbone, tmp_path):
    with pytest.raises(InputError, match="give `head_layers` 3 or 2"):
        attached(backbone, tmp_path, tensors(3))
    for layers, patch_mean in ((3, False), (2, True)):
        info = attached(backbone, tmp_path, tensors(3), layers=layers).info
        assert (info.layers, info.patch_mean) == (layers, patch_mean)


def test_a_missing_bias_is_zero(backbone, tmp_path):
    assert not attached(backbone, tmp_path, tensors(2, bias=False)).head.bias.any()


def evaluation(blocks=(1, 4), means=(True, False), rates=("0_00100", "0_00500")):
    """All classifiers of a linear evaluation, in DINOv2's names."""
    found = {}
    for n in blocks:
        for mean in means:
            for rate in rates:
                name = f"module.classifiers_dict.classifier_{n}_blocks_avgpool_{mean}_lr_{rate}.linear."
                found |= tensors(n + mean, name)
    return found


@pytest.mark.parametrize("place", ["linear_classifiers", "model"])
def test_one_of_all_classifiers_is_asked_for(backbone, tmp_path, place):
    content = {place: evaluation(), "iteration": 99, "best_accuracy": 81.0}
    with pytest.raises(InputError, match=r"holds 8 classifiers, of which 8 fit .* give `head_name` one of classifier_1_blocks"):
        attached(backbone, tmp_path, content)
    name = "classifier_4_blocks_avgpool_False_lr_0_00500"
    model = attached(backbone, tmp_path, content, name=name)
    assert torch.equal(model.head.weight, content[place][f"module.classifiers_dict.{name}.linear.weight"])
    assert (model.info.layers, model.info.patch_mean) == (4, False)
    with pytest.raises(InputError, match="holds 4 classifiers called 'lr_0_00500'"):
        attached(backbone, tmp_path, content, name="lr_0_00500")
    with pytest.raises(InputError, match="holds no classifier called 'nonsense'"):
        attached(backbone, tmp_path, content, name="nonsense")


def test_the_only_one_that_fits_is_taken(backbone, tmp_path):
    content = {"linear_classifiers": evaluation(means=(True,), rates=("0_1",))}
    assert attached(backbone, tmp_path, content, layers=4).info.layers == 4


def test_the_head_of_a_whole_model_is_found(tmp_path, backbone):
    """A file with the backbone too, whose layers are matrices as well."""
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()} | tensors(2, "linear_head.")
    found = find_classifiers(tmp_path / "w.pth", state)
    assert [one.name for one in found] == ["linear_head"]


def test_a_batch_norm_before_the_classifier_is_refused(tmp_path):
    content = {"head.0.running_mean": torch.zeros(D), "head.0.running_var": torch.ones(D)} | tensors(1, "head.1.")
    with pytest.raises(InputError, match="batch norm"):
        find_classifiers(tmp_path / "w.pth", content)


@pytest.mark.parametrize("d_in", [0, 1, 7, 47, 49, 10**6])
def test_widths_that_fit_nothing_are_refused(tmp_path, d_in):
    classifier = Classifier("", torch.empty(CLASSES, d_in, device="meta"), torch.zeros(CLASSES))
    with pytest.raises(InputError, match=f"takes {d_in} features"):
        features_of(tmp_path / "w.pth", classifier, D, None)


def test_a_name_chooses_by_a_whole_part_first(tmp_path):
    found = [Classifier(name, torch.zeros(2, D), torch.zeros(2)) for name in ("a.lr_1", "a.lr_10")]
    assert choose(tmp_path, found, "lr_1", D, None) is found[0]
