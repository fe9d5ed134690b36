"""Files whose outputs are tokens, and files with their weights beside them."""

import copy

import numpy as np
import onnx
import pytest
import torch

from tests.conftest import TINY, make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.export_onnx import main as export_main
from vitoats.cli.train_linear_probe import main as train_linear_probe
from vitoats.common.errors import InputError
from vitoats.data.images import open_images
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.features import extract
from vitoats.evaluation.frozen import frozen_file, frozen_model
from vitoats.evaluation.target import onnx_target
from vitoats.export.onnx_file import export_onnx
from vitoats.export.verify import verify
from vitoats.loading.head_files import HeadFile, attach_head, save_head
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.models.heads import HeadInfo
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
    with pytest.raises(InputError, match=r"gives features.*give `head`"):
        onnx_target(str(tmp_path / "model.onnx"), 1)


@pytest.fixture(scope="module")
def token_files(sparse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    for kind in ("cls", "patches", "all", "layers=3"):
        export_onnx(sparse.with_features(kind), folder / f"{kind}.onnx", "inline")
    return folder


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("patch_mean", [False, True])
def test_a_head_on_a_file_of_tokens_gives_the_logits_of_the_model(sparse, token_files, tmp_path, layers, patch_mean):
    torch.manual_seed(0)
    weight, bias = torch.randn(7, (layers + patch_mean) * 48), torch.randn(7)
    path = tmp_path / "head.safetensors"
    save_head(path, weight, bias, HeadInfo("tiny", 32, layers, patch_mean=patch_mean))
    backbone = copy.deepcopy(sparse.timm_model)
    backbone.num_classes = 0
    with torch.inference_mode():
        expected = attach_head(backbone, HeadFile(path), source="tiny", img_size=32)(IMAGES)
    fitting = {(1, False): ["cls", "all", "layers=3"], (1, True): ["all", "layers=3"]}.get((layers, patch_mean), ["layers=3"])
    for kind in ("cls", "patches", "all", "layers=3"):
        if kind in fitting:
            found = onnx_target(str(token_files / f"{kind}.onnx"), 1, head=HeadFile(path)).predict(IMAGES)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        else:
            with pytest.raises(InputError, match="export it with `features='all'`"):
                onnx_target(str(token_files / f"{kind}.onnx"), 1, head=HeadFile(path))


def test_a_probe_and_neighbours_of_a_file(sparse, token_files, image_tree, tmp_path, succeed, refuse):
    file, head = token_files / "all.onnx", tmp_path / "head.safetensors"
    flags = ["--data-dir", image_tree, "--solver", "lbfgs", "--knn", 3]
    made = succeed(train_linear_probe, "--model", file, *flags, "-o", head)
    assert made["n_train"] == 24
    torch_model = frozen_model(sparse, "cpu")
    of_torch, of_file = (extract(f.tokens, [(IMAGES, torch.zeros(3))]) for f in (torch_model, frozen_file(str(file), 1, None)))
    assert torch.allclose(of_torch.select(1, True), of_file.select(1, True), atol=1e-4)
    scored = succeed(eval_imagenet, "--model", file, "--head", head, image_tree)
    assert scored["top1"] == pytest.approx(made["top1"])
    assert "leave --checkpoint out" in refuse(
        train_linear_probe, "--model", file, *flags, "-o", "h.safetensors", "--checkpoint", head
    )
    line = refuse(train_linear_probe, "--model", token_files / "cls.onnx", *flags, "-o", tmp_path / "other.safetensors")
    assert "--features all" in line


def test_feature_errors_of_a_file_against_its_dense_one(sparse, token_files, image_tree, tmp_path, succeed, refuse):
    dense = tmp_path / "dense.onnx"
    export_onnx(LoadedModel("tiny", make_tiny(), Preprocessing(img_size=32), "random").with_features("all"), dense)
    found = succeed(eval_imagenet, "--model", token_files / "all.onnx", "--against", dense, image_tree)
    assert (found["n_images"], list(found["features"])) == (24, ["cls", "patches"])
    dataset = open_images(str(image_tree), "test", sparse.preprocessing.transform())
    images = torch.stack([dataset[i][0] for i in range(24)])
    with torch.inference_mode():
        ours, theirs = (model.forward_features(images)[:, 0].double() for model in (sparse.model, make_tiny()))
    error = (ours - theirs).square().sum() / (theirs - theirs.mean(dim=0)).square().sum()
    assert found["features"]["cls"]["relative_error"] == pytest.approx(float(error), rel=1e-3)
    same = succeed(eval_imagenet, "--model", dense, "--against", dense, image_tree)
    assert same["features"]["patches"] == {"relative_error": 0.0, "cosine": pytest.approx(1.0)}
    line = refuse(eval_imagenet, "--model", token_files / "cls.onnx", "--against", dense, image_tree)
    assert "export both with the same --features" in line


def test_a_head_beside_features_is_refused_at_export(tiny_folder, tmp_path, refuse):
    flags = ["--model", f"local-dir:{tiny_folder}", "--features", "cls", "--head", "h.pth", "-o", tmp_path / "m.onnx"]
    assert "leave --head out" in refuse(export_main, *flags)


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
