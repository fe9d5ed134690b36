"""Compressing on a GPU gives what compressing on the CPU gives, up to the order of sums."""

import pytest
import torch

import vitoats
from tests.conftest import make_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("method", "weights"), [("oats-h", "float32"), ("oats-h", "int8"), ("oats", "float32"), ("mrp", "float32")]
)
def test_a_gpu_and_the_cpu_find_the_same_layers(method, weights, image_tree):
    found, errors = {}, {}
    for device in ("cpu", "cuda"):
        result = vitoats.compress(
            make_tiny(), image_tree, method=method, compression=0.5, nsamples=16, weights=weights, device=device, threads=1
        )
        layers = [module for module in result.model.modules() if hasattr(module, "folded")]
        found[device] = [layer.folded().weight.detach().double().cpu() for layer in layers]
        errors[device] = result.about["feature_error"]["own"]
    assert len(found["cpu"]) == len(found["cuda"]) == 12
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.2)
    if method != "oats-h":  # whose last bits decide over budgets and supports, in a model this small
        for on_cpu, on_gpu in zip(found["cpu"], found["cuda"], strict=True):
            assert (on_cpu - on_gpu).norm() < 0.05 * on_cpu.norm()  # a few entries change places at the threshold


def test_convolutions_run_in_float32():
    x, weight = torch.randn(4, 256, 16, 16), torch.randn(64, 256, 8, 8)
    vitoats.common.devices.check_device("cuda")
    out = torch.nn.functional.conv2d(x.cuda(), weight.cuda(), stride=8).cpu().double()
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), stride=8)
    assert (out - exact).norm() < 1e-5 * exact.norm()
