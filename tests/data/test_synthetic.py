"""Synthetic images and the calibration mix: a fixed series, spectra that fall, shares and held-out sets that add up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import write_image
from vitoats.common.errors import InputError
from vitoats.data.calibration import calibration_images, split
from vitoats.data.synthetic import SPECTRAL_EXPONENTS, SyntheticImages, coloured_noise, synthetic_image
from vitoats.data.transforms import Preprocessing

PREPROCESSING = Preprocessing(img_size=32)


def mix(flat_images, kind="synthetic", nsamples=12, general=None, held_out=4, seed=0):
    return calibration_images(str(flat_images), general, kind, nsamples, held_out, seed, PREPROCESSING)


def test_an_image_depends_on_its_seed_and_place_alone():
    first = np.asarray(synthetic_image(64, 0, 5))
    assert np.array_equal(first, np.asarray(synthetic_image(64, 0, 5)))
    assert not np.array_equal(first, np.asarray(synthetic_image(64, 0, 6)))
    assert not np.array_equal(first, np.asarray(synthetic_image(64, 1, 5)))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8


def test_the_series_keeps_its_images():
    """Folders that were calibrated on them say only the seed."""
    totals = [int(np.asarray(synthetic_image(98, 0, i)).astype(int).sum()) for i in range(3)]
    assert totals == TOTALS


TOTALS = [3881893, 3326280, 4571570]


def test_images_vary_in_colour_and_contrast():
    images = np.stack([np.asarray(synthetic_image(48, 0, i)) for i in range(40)]).astype(float)
    assert images.std(axis=(1, 2)).min() > 5  # no channel of no image is flat
    assert images.mean(axis=(1, 2)).std(axis=0).min() > 10


def test_noise_falls_with_frequency():
    size = 128
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    band = (f > 0.02) & (f < 0.4)
    slopes = []
    for seed in range(12):
        noise = coloured_noise(size, size, np.random.default_rng(seed))
        assert noise.mean() == pytest.approx(0, abs=1e-9)
        amplitude = np.abs(np.fft.fft2(noise[:, :, 0]))
        slopes.append(-np.polyfit(np.log(f[band]), np.log(amplitude[band]), 1)[0])
    assert SPECTRAL_EXPONENTS[0] - 0.1 < min(slopes)
    assert max(slopes) < SPECTRAL_EXPONENTS[1] + 0.1


@given(st.integers(0, 3000), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_total_is_split_in_proportion(total, weights):
    parts = split(total, {str(i): weight for i, weight in enumerate(weights)})
    assert sum(parts.values()) == total
    for part, weight in zip(parts.values(), weights, strict=True):
        assert abs(part - total * weight / sum(weights)) <= 1


def test_two_thirds_of_the_images_are_the_users(flat_images):
    images = mix(flat_images, nsamples=12)
    batches = torch.cat(list(images.batches(5, 0)))
    assert len(batches) == images.nsamples == 12
    alone = torch.cat(list(mix(flat_images, "none", nsamples=8).batches(5, 0)))
    assert torch.equal(batches[:8], alone)
    series = {tuple(SyntheticImages(12, PREPROCESSING, 0)[i][0].flatten()[:8].tolist()) for i in range(12)}
    assert all(tuple(image.flatten()[:8].tolist()) in series for image in batches[8:])
    few = images.at_most(3)
    assert few.shares == {"own": 2, "synthetic": 1}
    assert torch.equal(torch.cat(list(few.batches(5, 0))), batches[[0, 1, 8]])


def test_where_the_user_has_few_images_all_of_them_are_drawn(flat_images):
    images = mix(flat_images, nsamples=90)
    assert images.shares == {"own": len(images.sources["own"]), "synthetic": 30}
    assert sum(len(b) for b in images.batches(8, 0)) == images.nsamples


def test_both_other_kinds_have_half_as_many_images_as_the_user(flat_images, image_tree):
    images = mix(flat_images, "both", nsamples=12, general=str(image_tree))
    assert images.shares == {"own": 6, "general": 3, "synthetic": 3}
    assert sum(len(b) for b in images.batches(4, 0)) == 12
    assert set(images.held_out) == {"own", "general", "synthetic"}


def test_held_out_images_take_no_part(flat_images):
    images = mix(flat_images, nsamples=12, held_out=4)
    used = {tuple(i.flatten()[:8].tolist()) for b in images.batches(4, 0) for i in b}
    for name, source in images.held_out.items():
        assert len(source) == 4
        assert not used & {tuple(source[i][0].flatten()[:8].tolist()) for i in range(4)}, name


def test_where_all_images_calibrate_none_is_held_out(flat_images):
    images = mix(flat_images, "none", nsamples=20)
    assert set(images.held_out) == {"synthetic"}


@pytest.mark.parametrize(
    ("kind", "general", "said"),
    [("general", None, "`general_images`"), ("synthetic", "somewhere", "`calibration_mix`"), ("half", None, "synthetic")],
)
def test_a_mix_that_cannot_be_is_refused(flat_images, kind, general, said):
    with pytest.raises(InputError, match=said):
        mix(flat_images, kind, general=general)


def test_copies_of_one_image_are_refused_unless_others_are_mixed_in(tmp_path):
    for i in range(5):
        Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match=r"images are copies of one.*`calibration_mix='synthetic'`"):
        next(mix(tmp_path, "none").batches(2, 0))
    mixed = mix(tmp_path, "synthetic")
    assert mixed.are_copies()
    assert len(next(mixed.batches(2, 0))) == 2
    next(mix(tmp_path, "none", nsamples=1).batches(2, 0))  # one image is what was asked for
    write_image(tmp_path / "other.png", 1)
    next(mix(tmp_path, "none").batches(2, 0))
