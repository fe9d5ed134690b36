"""Preprocessing that cannot be is refused where it is made, whoever describes it."""

import pytest
from PIL import Image

from vitoats.common.errors import InputError
from vitoats.data.transforms import CROP_MODES, INTERPOLATIONS, Preprocessing

GOOD = Preprocessing(32).to_dict()
BAD = {
    "img_size": [0, -1, True, 1.5, "32", None, [32], 4097, 10**9],
    "crop_pct": [0, -1, 1e-9, 1e9, float("nan"), float("inf"), "0.9", None, True],
    "crop_mode": ["middle", "", None, 1, ["center"]],
    "interpolation": ["cubic", "random", "", None, 3, ["bicubic"]],
    "mean": [
        [0.5, 0.5],
        [0.5] * 4,
        ["a", "b", "c"],
        [0.5, 0.5, float("nan")],
        [0, 0, float("inf")],
        "abc",
        0.5,
        None,
        [None] * 3,
    ],
    "std": [[0.5, 0.5, 0], [0.5, 0.5, -1], [0.5, 0.5, float("nan")], ["a", "b", "c"], 1.0, None, [True] * 3],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_what_cannot_be_is_refused(key, value):
    with pytest.raises(InputError) as error:
        Preprocessing.from_dict({**GOOD, key: value})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("values", [{}, [], None, "x", {**GOOD, "more": 1}, {k: v for k, v in GOOD.items() if k != "img_size"}])
def test_what_is_no_description_is_refused(values):
    with pytest.raises(InputError):
        Preprocessing.from_dict(values)


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_what_is_allowed_works(mode, interpolation):
    made = Preprocessing(32, 1.0 if mode == "squash" else 0.9, mode, interpolation)
    assert Preprocessing.from_dict(made.to_dict()) == made
    if interpolation not in ("hamming", "lanczos", "box"):  # torchvision's border crop goes by way of tensors
        assert made.transform()(Image.new("RGB", (40, 50))).shape == (3, 32, 32)
