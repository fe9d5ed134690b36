"""Proves that features are the classifier's input, in torch and in ONNX, and that crops are what they say."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.conftest import make_tiny, write_image
from vitoats.common.errors import InputError, RunError
from vitoats.data.crops import Crops
from vitoats.data.images import batches, open_images
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.fidelity import (
    Fidelity,
    cosines,
    layer_error,
    logits_and_features,
    outcome,
    relative_error,
    stacked_features,
)
from vitoats.export.int8 import classifier_input, quantize, with_output
from vitoats.export.onnx_file import export_onnx
from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.loading.loaded import LoadedModel
from vitoats.models.heads import HeadInfo, LinearHeadClassifier
from vitoats.models.inputs import ImageInputs

SIZE = Preprocessing(img_size=32)


def models(kind):
    """The tiny model with its own classifier, or as a backbone with a linear head."""
    model = make_tiny()
    if kind == "linear head":
        model.reset_classifier(0)
        model = LinearHeadClassifier(model, torch.randn(4, 96), torch.randn(4), HeadInfo()).eval()
    return LoadedModel("tiny", model, SIZE, "")


@pytest.mark.parametrize("kind", ["own classifier", "linear head"])
def test_features_are_what_the_classifier_gets(kind):
    loaded, images = models(kind), torch.randn(3, 3, 32, 32)
    logits, features = logits_and_features(loaded, "cpu")(images)
    with torch.inference_mode():
        torch.testing.assert_close(logits, loaded.model(images))
        torch.testing.assert_close(F.linear(features, loaded.model.head.weight, loaded.model.head.bias), logits)
    assert features.shape == (3, 96 if kind == "linear head" else 48)
    assert not loaded.model.head._forward_pre_hooks


def test_an_onnx_file_shows_the_same_features(tmp_path):
    loaded, images = models("linear head"), torch.randn(3, 3, 32, 32)
    logits, features = logits_and_features(loaded, "cpu")(images)
    proto = export_onnx(loaded, tmp_path / "dense.onnx")
    name = classifier_input(proto)
    opened = ort.InferenceSession(with_output(proto, name).SerializeToString())
    found = opened.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found[0], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], features, rtol=1e-4, atol=1e-5)

    quantize(tmp_path / "dense.onnx", tmp_path / "int8.onnx")
    int8 = onnx.load(str(tmp_path / "int8.onnx"))
    assert any(node.op_type == "MatMulInteger" for node in int8.graph.node)
    found = ort.InferenceSession(with_output(int8, name).SerializeToString()).run(None, {"images": images.numpy()})
    assert 0 < relative_error(found[1], features.numpy()) < 0.05


def test_a_file_that_ends_in_no_linear_layer_is_refused():
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (2, 3)) for name in "xy")
    softmax = onnx.helper.make_node("Softmax", ["x"], ["y"])
    with pytest.raises(InputError, match="linear classifier"):
        classifier_input(onnx.helper.make_model(onnx.helper.make_graph([softmax], "g", [x], [y])))


def test_a_model_without_classifier_is_refused():
    loaded = models("own classifier")
    loaded.model.reset_classifier(0)
    with pytest.raises(InputError, match="`head`"):
        logits_and_features(loaded, "cpu")


def test_figures_of_features():
    dense = np.array([[1.0, 0], [0, 1], [-1, -1]], np.float32)  # of mean 0
    assert relative_error(dense, dense) == 0
    assert relative_error(np.zeros((3, 2), np.float32), dense) == pytest.approx(1)  # as bad as the mean
    assert relative_error(dense + 1, dense) == pytest.approx(6 / 4)
    np.testing.assert_allclose(cosines(2 * dense, dense), 1, rtol=1e-6)
    np.testing.assert_allclose(cosines(np.roll(dense, 1, axis=1)[:2], dense[:2]), 0)
    assert cosines(np.zeros((1, 2), np.float32), dense[:1]) == 0


def test_layer_error_sees_what_a_layer_does_and_not_its_inputs():
    """Two layers: one as before, one that gives its bias alone; that is an error of 0 and one of 1."""
    dense, small = make_tiny(), make_tiny()
    for name, kept in (("fc1", 0), ("fc2", 1)):
        linear = small.blocks[0].mlp.get_submodule(name)
        d_out, d_in = linear.weight.shape
        layer = SparseLowRankLinear(kept * linear.weight.data, [torch.zeros(d_out, 0)], [torch.zeros(0, d_in)], linear.bias)
        replace_module(small, f"blocks.0.mlp.{name}", layer)
    assert layer_error(dense, small, iter([torch.randn(3, 3, 32, 32)] * 2)) == pytest.approx(0.5, abs=1e-5)
    assert layer_error(dense, make_tiny(), iter([])) is None


# ---- crops


def test_crops_are_the_models_view_and_seeded_squares():
    write = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    image = Image.fromarray(write)
    views = Crops(SIZE, 5, seed=3)(image)
    assert views.shape == (6, 3, 32, 32)
    torch.testing.assert_close(views[0], SIZE.transform()(image))
    assert torch.equal(Crops(SIZE, 5, seed=3)(image.copy()), views)
    other = Crops(SIZE, 5, seed=4)(image)
    assert torch.equal(other[0], views[0])
    assert all(not torch.equal(a, b) for a, b in zip(other[1:], views[1:], strict=True))
    assert len({view.sum().item() for view in views}) == 6


def test_a_crop_keeps_its_shape():
    """On a ramp of one grey value a pixel, the span of a crop is its side: half to all of the short side."""
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    view = Crops(SIZE, 8, seed=0)(Image.fromarray(ramp).convert("RGB"))[1:, 0] * SIZE.std[0] + SIZE.mean[0]
    span = 255 * (view[:, :, -1] - view[:, :, 0]).mean(dim=1) * 32 / 31  # the crop's width in pixels
    assert ((span > 45) & (span < 102)).all()


def test_crops_do_not_depend_on_the_order(tmp_path):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", i)
    dataset = open_images(str(tmp_path), "test", Crops(SIZE, 2, seed=0))
    first = torch.cat([x for x, _ in batches(dataset, [0, 1, 2], 2, 0)])
    again = torch.cat([x for x, _ in batches(dataset, [2, 1, 0], 3, 1)])
    assert first.shape == (3, 3, 3, 32, 32)
    assert torch.equal(first, again.flip(0))


def test_images_without_a_scale_of_their_own_give_no_error(tiny):
    """One image, or several that are the same: there is nothing to compare an error with."""
    several = [(torch.randn(3, 32, 32), 0) for _ in range(3)]
    sets = {"several": several, "one": several[:1], "same": [several[0], several[0]], "none": []}
    noted = Fidelity(tiny, ImageInputs(32), sets, batch_size=2, workers=0)
    for parameter in tiny.parameters():
        parameter.data *= 1.01
    assert set(noted.errors(tiny)) == {"several"}
    assert 0 < noted.errors(tiny)["several"] < 1


@pytest.mark.parametrize("when", ["before", "now"])
def test_features_that_are_not_finite_are_no_error_of_nan(tiny, when):
    """NaN is not larger than a limit, and would pass for a small error."""
    images = [(torch.randn(3, 32, 32), 0) for _ in range(3)]
    noted = Fidelity(tiny, ImageInputs(32), {"own": images}, batch_size=2, workers=0)
    tiny.blocks[0].mlp.fc2.bias.data[0] = float("nan")
    with pytest.raises(RunError, match="features of own images are not finite"):
        noted.errors(tiny) if when == "now" else Fidelity(tiny, ImageInputs(32), {"own": images}, batch_size=2, workers=0)


def test_an_error_without_a_scale_or_of_nan_is_refused():
    same, other = np.ones((4, 3), np.float32), np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    with pytest.raises(InputError, match="features of all images are the same"):
        relative_error(other, same)
    for features in (np.full_like(other, np.nan), np.where(other == other[0], np.inf, other)):
        with pytest.raises(RunError, match="not finite"):
            relative_error(features, other)
        with pytest.raises(RunError, match="not finite"):
            relative_error(other, features)


def test_a_model_whose_features_are_not_finite_has_no_outcome():
    images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)

    def forward(batch):
        return torch.randn(len(batch), 4), torch.full((len(batch), 6), float("inf"))

    with pytest.raises(RunError, match="features are not finite"):
        outcome(forward, iter([(images, labels)]), 4)
    with pytest.raises(RunError, match="features are not finite"):
        stacked_features(forward, iter([(images[:, None], labels)]))


def test_a_layer_that_is_always_zero_has_no_error():
    dense, compressed = make_tiny(), make_tiny()
    for name in ("blocks.0.attn.proj", "blocks.1.mlp.fc2"):
        weight, bias = dense.get_submodule(name).weight.data, dense.get_submodule(name).bias.data
        if name == "blocks.0.attn.proj":
            weight.zero_()
        empty = [weight.new_zeros(len(weight), 0)], [weight.new_zeros(0, weight.shape[1])]
        replace_module(compressed, name, SparseLowRankLinear(0.9 * weight, *empty, bias))
    assert layer_error(dense, compressed, iter([torch.randn(4, 3, 32, 32)])) == pytest.approx(0.01, rel=1e-3)
