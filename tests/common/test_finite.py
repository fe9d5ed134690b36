import pytest
import torch

from vitoats.common.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_one_wrong_number_anywhere_is_found(dtype, wrong):
    x = torch.full((3, 67), torch.finfo(dtype).max, dtype=dtype)  # whose sum is infinite
    assert is_finite(x)
    for row, column in ((0, 0), (1, 40), (2, 66)):
        broken = x.clone()
        broken[row, column] = wrong
        assert not is_finite(broken)
        assert not is_finite(broken.T)


def test_nothing_is_finite():
    assert is_finite(torch.zeros(0, 4))
