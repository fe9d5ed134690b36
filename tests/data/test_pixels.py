"""Images of more than 8 bits keep their brightness."""

import numpy as np
import pytest
from PIL import Image

from vitoats.data.images import open_images
from vitoats.data.pixels import convert, rgb

RAMP = np.linspace(0, 1, 256).reshape(16, 16)  # from black to white


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((RAMP * 255).round().astype(np.uint8), "x.png"),
        ((RAMP * 65535).round().astype(np.uint16), "x.png"),
        ((RAMP * 65535).round().astype(np.uint16), "x.tif"),
        ((RAMP * 65535).round().astype(np.int32), "x.tif"),
        ((RAMP * 255).round().astype(np.int32), "x.tif"),
        ((RAMP * 2**31 * 0.99).astype(np.int32), "x.tif"),
        (RAMP.astype(np.float32), "x.tif"),
        ((RAMP * 255).astype(np.float32), "x.tif"),
        ((RAMP * 65535).astype(np.float32), "x.tif"),
        ((RAMP * 1e6 - 5e5).astype(np.float32), "x.tif"),
        (np.asfortranarray((RAMP * 65535).round().astype(">u2")), "x.tif"),
    ],
)
def test_a_ramp_from_black_to_white_stays_one(tmp_path, values, name):
    Image.fromarray(values).save(tmp_path / name)
    seen, _ = open_images(str(tmp_path), "test", lambda image: np.asarray(convert(image, 3)))[0]
    assert seen.shape == (16, 16, 3)
    assert seen.dtype == np.uint8
    assert np.abs(seen - (RAMP * 255)[:, :, None]).max() <= 1


def test_dark_images_stay_dark():
    assert np.asarray(rgb(Image.fromarray(np.full((4, 4), 1000, np.uint16)))).max() == 4
    assert np.asarray(rgb(Image.fromarray(np.full((4, 4), 0.1, np.float32)))).max() == 26


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("level", [-1.0, 1e9])
def test_one_level_out_of_all_ranges_is_black(level):
    assert np.asarray(rgb(Image.fromarray(np.full((4, 4), level, np.float32)))).max() == 0


def test_values_that_are_not_finite_are_black():
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    assert np.asarray(rgb(Image.fromarray(values)))[0, :4, 0].tolist() == [0, 0, 0, 3]


def test_other_kinds_are_as_pillow_converts_them():
    image = Image.effect_noise((8, 8), 60)
    for mode in ("L", "RGB", "P", "1", "CMYK", "LA", "RGBA"):
        assert rgb(image.convert("RGB").convert(mode)).tobytes() == image.convert("RGB").convert(mode).convert("RGB").tobytes()


def test_numbers_of_channels():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (5, 6, 4)).astype(np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    assert np.array_equal(np.asarray(convert(image, 4)), pixels)
    assert convert(image, 1).tobytes() == image.convert("RGB").convert("L").tobytes()
    assert np.asarray(convert(image.convert("RGB"), 4))[:, :, 3].min() == 255
    deep = np.full((4, 4), 2**15, np.uint16)
    assert [np.asarray(convert(Image.fromarray(deep), n)).max() for n in (1, 3)] == [128, 128]
