"""The example service, as a real server: its answers are those of the library, and bad input is refused in one line."""

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitoats.data.transforms import Preprocessing

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
JPEG = {"Content-Type": "image/jpeg"}


def module(path: str):
    sys.path.insert(0, str((EXAMPLES / path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[Path(path).stem] = made
    spec.loader.exec_module(made)
    return made


service, load_test = module("serve/service.py"), module("serve/load_test.py")


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny ViT with random weights."""
    import timm

    import vitoats

    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    vitoats.export_onnx(dense, path)
    return path


@pytest.fixture(scope="module")
def address(exported):
    with load_test.served(str(exported)) as address:
        yield address


@pytest.mark.parametrize(("width", "height"), [(32, 32), (57, 40), (33, 90), (400, 301)])
def test_images_are_prepared_as_for_evaluation(exported, width, height):
    random = np.random.default_rng(width)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
    model = service.Model(str(exported))
    from vitoats.runtime import metadata

    own = Preprocessing.from_dict(metadata(model.session)["preprocessing"])
    assert np.allclose(model.prepare(image)[0], own.transform()(image).numpy(), atol=1e-6)


def test_answers_are_those_of_the_file(exported, address):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))
    body = encoded(image, "PNG")
    answer = httpx2.post(f"{address}/predict", content=body, headers={"Content-Type": "image/png"}).json()
    model = service.Model(str(exported))
    assert np.array_equal(np.float32(answer["outputs"]), model(body))


BOMB = Image.new("1", (20_000, 20_000))
BAD = [
    (b"", JPEG, 400, "empty"),
    (b"hello", JPEG, 400, "no image"),
    (encoded(Image.new("RGB", (64, 64)))[:100], JPEG, 400, "no image"),
    (b"hello", {"Content-Type": "text/plain"}, 415, "send an image"),
    (b"hello", {}, 415, "send an image"),
    (b"x" * 10_000_001, JPEG, 413, "at most 10000000 bytes"),
    (encoded(BOMB, "PNG"), {"Content-Type": "image/png"}, 400, "pixels|no image"),
]


@pytest.mark.parametrize(("body", "headers", "status", "detail"), BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_input_is_refused_in_one_line(address, body, headers, status, detail):
    answer = httpx2.post(f"{address}/predict", content=body, headers=headers)
    assert answer.status_code == status
    import re

    assert re.search(detail, answer.json()["detail"])
    assert "\n" not in answer.json()["detail"]
    assert httpx2.get(f"{address}/health").status_code == 200
