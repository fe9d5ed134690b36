"""Files for images of any size, of rectangles, and of other channels than RGB, against timm's own models."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import save_for_hf

from tests.conftest import TINY, make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.benchmark.profile import profile
from vitoats.cli.compress import main as compress
from vitoats.cli.eval_imagenet import main as evaluate
from vitoats.cli.export_onnx import main as export_main
from vitoats.common.errors import InputError
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.target import onnx_target
from vitoats.export.int8_layers import rounded
from vitoats.export.onnx_file import export_onnx
from vitoats.export.verify import verify
from vitoats.format.layers import compressed_layers
from vitoats.loading.load import from_memory, load_model
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.runtime import metadata, session

import timm  # isort: skip

MODEL = {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}  # of vit_tiny_patch16_224
SIZES = ((32, 32), (48, 24), (16, 72))


@pytest.fixture(scope="module")
def sparse() -> LoadedModel:
    model = make_tiny(depth=1)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    compress_in_place(model, images, job_of("oats", OATSConfig(iterations=2)))
    return LoadedModel("tiny", model, Preprocessing(img_size=32), "random")


def timms(loaded: LoadedModel) -> torch.nn.Module:
    """The same model with timm's own ``dynamic_img_size``, its layers folded."""
    model = timm.create_model("vit_tiny_patch16_224", **TINY | {"depth": 1}, dynamic_img_size=True).eval()
    state = dict(loaded.model.state_dict())
    for name, layer in compressed_layers(loaded.model).items():
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.data}
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_a_free_size_gives_what_timms_dynamic_img_size_gives(sparse, tmp_path, form):
    path = tmp_path / "model.onnx"
    proto = export_onnx(sparse.with_free_size(), path, form)
    assert [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [
        *("batch", 3, "8*height", "8*width")
    ]
    assert sum(node.op_type == "QKVAttention" for node in proto.graph.node) == (form == "sparse")
    expected = timms(sparse)
    for native in (True, False):
        opened = session(path, native=native)
        assert len(opened.native_nodes) == (4 if native and form == "sparse" else 0)
        for height, width in SIZES:
            images = torch.randn(2, 3, height, width)
            with torch.inference_mode():
                logits = expected(images).numpy()
            found = opened.run(None, {"images": images.numpy()})[0]
            assert np.abs(found - logits).max() < 1e-4 * np.abs(logits).max()
    assert metadata(opened)["img_size_multiple_of"] == 8
    assert verify(sparse.with_free_size(), opened).relative_error < 1e-4
    assert not sparse.model.dynamic_img_size  # it was a copy


def test_a_free_size_in_int8(tmp_path):
    loaded = LoadedModel("tiny", make_tiny(depth=1), Preprocessing(img_size=32), "random").with_free_size()
    proto = export_onnx(loaded, tmp_path / "model.onnx", int8=True)
    assert any(tensor.data_type == tensor.INT8 for tensor in proto.graph.initializer)
    for native in (True, False):
        opened = session(tmp_path / "model.onnx", native=native)
        assert verify(rounded(loaded), opened).relative_error < 0.05  # activations are rounded in the file


def test_a_free_size_is_chosen_in_evaluation(sparse, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(sparse.with_free_size(), path, "dense")
    assert onnx_target(str(path), 1, img_size=(16, 40)).preprocessing.img_size == (16, 40)
    with pytest.raises(InputError, match="multiples of 8, not 20"):
        onnx_target(str(path), 1, img_size=20)
    assert profile(path, 1, 1)  # tools that time a file take the usual size
    export_onnx(sparse, path, "dense")
    with pytest.raises(InputError, match=r"32 px only.*`dynamic_img_size`"):
        onnx_target(str(path), 1, img_size=16)


def test_features_and_rotary_positions_of_a_free_size(tmp_path):
    small = {"embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0, "img_size": 32}
    model = timm.create_model("vit_small_patch16_dinov3", **small).eval()
    loaded = from_memory(model, img_size=32).with_features("all").with_free_size()
    export_onnx(loaded, tmp_path / "model.onnx")
    assert verify(loaded, session(tmp_path / "model.onnx")).relative_error < 1e-4


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}, "one size only"),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1)}, "one size only"),
        ("eva02_tiny_patch14_224", {"embed_dim": 48, "depth": 1, "num_heads": 3}, "dynamic_img_size=True"),
    ],
)
def test_models_whose_size_stays_fixed(name, kwargs, said):
    with pytest.raises(InputError, match=said):
        from_memory(timm.create_model(name, **kwargs).eval()).with_free_size()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Folders of tiny models for rectangles of 24 x 40 px of one, three and four channels, and labelled images."""
    root = tmp_path_factory.mktemp("shapes")
    for channels in (1, 3, 4):
        torch.manual_seed(0)
        args = {**TINY, "depth": 1, "img_size": (24, 40), "in_chans": channels}
        save_for_hf(
            timm.create_model("vit_tiny_patch16_224", **args),
            str(root / f"m{channels}"),
            model_args=args,
            safe_serialization=True,
        )
    random = np.random.default_rng(0)
    for i in range(24):
        path = root / "images" / "abcd"[i % 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (30, 50, 4)).astype(np.uint8), "RGBA").save(path)
    return root


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_rectangles_and_channels_from_compress_to_evaluation(shapes, tmp_path, succeed, channels):
    images, folder, file = shapes / "images", tmp_path / "folder", tmp_path / "model.onnx"
    flags = [
        "--data-dir",
        images,
        "--nsamples",
        16,
        "--method",
        "wanda",
        "--compression",
        0.5,
        "--allocation",
        "uniform",
        "--calibration-mix",
        "synthetic",
    ]
    succeed(compress, *["--model", f"local-dir:{shapes / f'm{channels}'}", *flags, "-o", folder])
    written = json.loads((folder / "vitoats.json").read_text())["preprocessing"]
    assert (written["img_size"], len(written["mean"])) == ([24, 40], channels)
    result = succeed(export_main, *[folder, "-o", file, "--verify", "--data-dir", images])
    assert result["relative_error"] < 1e-4
    assert (result["img_size"], result["n_images"], result["differing"]) == ([24, 40], 24, [])
    of_file, of_folder = (succeed(evaluate, *["--model", model, images]) for model in (file, folder))
    assert of_file["n_correct1"] == of_folder["n_correct1"]
    # timm's own transform and model are the reference
    model = timm.create_model(f"local-dir:{shapes / f'm{channels}'}", pretrained=True).eval()
    assert model.patch_embed.grid_size == (3, 5)
    assert load_model(str(folder)).timm_model.pos_embed.equal(model.pos_embed)


def test_images_are_resized_to_rectangles_as_timm_does(shapes):
    preprocessing = load_model(f"local-dir:{shapes / 'm3'}").preprocessing
    image = Image.open(shapes / "images" / "a" / "0.png").convert("RGB")
    own = timm.data.create_transform((3, 24, 40), mean=preprocessing.mean, std=preprocessing.std, **MODEL)
    assert torch.equal(preprocessing.transform()(image), own(image))


def test_positions_of_a_folder_are_resized_to_rectangles(plain):
    loaded = load_model(str(plain), img_size=(24, 48))
    assert loaded.timm_model.patch_embed.grid_size == (3, 6)
    with torch.inference_mode():
        assert loaded.model(torch.randn(1, 3, 24, 48)).shape == (1, 4)


def test_weights_of_other_channels_are_said_or_refused(shapes, caplog):
    kwargs = {key: value for key, value in TINY.items() if key != "img_size"} | {"depth": 1}
    grey, rgb = (shapes / f"m{channels}" / "model.safetensors" for channels in (1, 3))
    with pytest.raises(InputError, match="1-channel images, the model 3-channel ones: add `model_kwargs` in_chans=1"):
        load_model("vit_tiny_patch16_224", checkpoint=grey, model_kwargs=kwargs, img_size=(24, 40))
    own = load_model("vit_tiny_patch16_224", checkpoint=grey, model_kwargs={**kwargs, "in_chans": 1}, img_size=(24, 40))
    assert own.preprocessing.mean == (0.5,)
    with caplog.at_level(logging.WARNING):
        made = load_model("vit_tiny_patch16_224", checkpoint=rgb, model_kwargs={**kwargs, "in_chans": 1}, img_size=(24, 40))
    assert "for 3 channels, is adapted to 1" in caplog.text
    summed = load_model(f"local-dir:{shapes / 'm3'}").timm_model.patch_embed.proj.weight.sum(dim=1, keepdim=True)
    assert torch.allclose(made.timm_model.patch_embed.proj.weight, summed)
