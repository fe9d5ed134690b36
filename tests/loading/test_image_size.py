"""A compressed folder takes images of another size."""

import logging

import pytest
import torch

from tests.conftest import make_tiny
from vitoats.common.errors import InputError
from vitoats.loading.load import load_model
from vitoats.models.positions import resample


def test_positions_of_a_folder_are_resized_with_a_warning(plain, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load_model(str(plain), img_size=48)
    assert "compressed for 32 px; its positions are resized for 48 px" in caplog.text
    assert loaded.preprocessing.img_size == 48
    own = make_tiny().pos_embed
    expected = resample(own, (4, 4), (6, 6), "timm", prefix=1, registers=False)
    assert torch.allclose(loaded.timm_model.pos_embed, expected, atol=1e-6)
    with torch.inference_mode():
        assert loaded.model(torch.randn(2, 3, 48, 48)).shape == (2, 4)


def test_sizes_that_are_no_multiple_of_a_patch_are_refused(plain):
    with pytest.raises(InputError, match="multiples of 8, not 44"):
        load_model(str(plain), img_size=44)
