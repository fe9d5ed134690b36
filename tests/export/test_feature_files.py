"""Files whose outputs are tokens, and files with their weights beside them."""

import numpy as np
import onnx
import pytest
import torch

from tests.conftest import TINY, make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.common.errors import InputError
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.target import onnx_target
from vitoats.export.onnx_file import export_onnx
from vitoats.export.verify import verify
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.runtime import metadata, session
from vitoats.runtime.inference import data_file, stored_bytes

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def sparse() -> LoadedModel:
    model = make_tiny()
    compress_in_place(model, IMAGES, job_of("oats", OATSConfig(iterations=2)))
    return LoadedModel("tiny", model, Preprocessing(img_size=32), "random")


def test_tokens_of_two_layers(sparse, tmp_path):
    loaded = sparse.with_features("layers=2")
    proto = export_onnx(loaded, tmp_path / "model.onnx")
    shapes = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in proto.graph.output}
    assert shapes == {f"{k}_{i}": s for i in (1, 2) for k, s in (("cls", ["batch", 48]), ("patches", ["batch", 16, 48]))}
    assert "head.weight" not in {tensor.name for tensor in proto.graph.initializer}
    opened = session(tmp_path / "model.onnx")
    assert len(opened.native_nodes) == 12
    assert metadata(opened)["outputs"] == list(shapes)
    agreement = verify(loaded, opened, [(IMAGES, torch.zeros(3))])
    assert 0 < agreement.relative_error < 1e-4
    assert (agreement.n_images, agreement.differing) == (3, [])
    with pytest.raises(InputError, match="gives features"):
        onnx_target(str(tmp_path / "model.onnx"), 1)


def test_weights_in_a_second_file(sparse, tmp_path):
    path = tmp_path / "model.onnx"
    proto = export_onnx(sparse, path, external_data=True)
    onnx.checker.check_model(str(path), full_check=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    norms = 3 * 2 * 2 * 48
    assert stored_bytes(path) > data_file(path).stat().st_size > 4 * norms
    assert all(tensor.ByteSize() < 2000 for tensor in proto.graph.initializer)
    with torch.inference_mode():
        expected = sparse.model(IMAGES).numpy()
    for native in (True, False):
        opened = session(path, native=native)
        assert len(opened.native_nodes) == (12 if native else 0)
        found = opened.run(None, {"images": IMAGES.numpy()})[0]
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_large_models_have_their_weights_in_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("vitoats.export.onnx_file.LARGEST_FILE", 20_000)
    import timm

    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "depth": 1}).eval()
    path = tmp_path / "model.onnx"
    for _ in range(2):  # the second time over the first
        export_onnx(LoadedModel("tiny", model, Preprocessing(img_size=32), "random"), path)
        assert data_file(path).stat().st_size > 20_000 > path.stat().st_size
        assert len(list(tmp_path.iterdir())) == 2
    session(path)
