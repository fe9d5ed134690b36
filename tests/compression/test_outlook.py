"""What a compression covers and takes is said before any image is read, and by itself with --dry-run."""

import json
import logging

import pytest
import torch

import vitoats
from tests.in_place import job_of
from vitoats.cli.compress import main
from vitoats.common.errors import InputError
from vitoats.compression.outlook import outlook
from vitoats.compression.plan import plan_compression
from vitoats.methods.magnitude import MagnitudeConfig
from vitoats.methods.oats_h import OATSHConfig
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs

import timm  # isort: skip


class Images(torch.utils.data.Dataset):
    """Calls ``read`` before it gives the first image."""

    def __init__(self, read):
        self.read = read

    def __len__(self):
        return 16

    def __getitem__(self, index):
        self.read()
        return torch.zeros(3, 32, 32)


class FirstImageError(Exception):
    pass


def refuse():
    raise FirstImageError


@pytest.mark.parametrize("settings", [{}, {"allocation": "uniform"}, {"method": "oats"}, {"method": "numerical"}])
def test_it_is_said_before_the_first_image_is_read(tiny, caplog, settings):
    with caplog.at_level(logging.INFO, "vitoats"), pytest.raises(FirstImageError):
        vitoats.compress(tiny, Images(refuse), img_size=32, **settings)
    said = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert said[-4:] == ["coverage", "memory", "arithmetic", "time"]
    assert "12 linear layers in 3 blocks" in caplog.text


@pytest.mark.parametrize(
    ("name", "arguments", "settings"),
    [
        ("test_resnet", {}, {}),
        ("test_vit", {"img_size": 32}, {"method": "svd", "compression": 0.999}),
        ("test_vit", {"img_size": 32}, {"compression": 0.999}),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_image_is_read(name, arguments, settings):
    with pytest.raises(InputError):
        vitoats.compress(timm.create_model(name, **arguments).eval(), Images(refuse), img_size=32, **settings)


def test_the_counts_by_hand(tiny):
    adapter = adapt(tiny, ImageInputs(32))
    found = outlook(plan_compression(adapter, job_of("oats-h", OATSHConfig()), 8), job_of("oats-h", OATSHConfig()))
    assert (found.n_layers, found.n_blocks, found.weights) == (12, 3, 3 * 12 * 48**2)
    assert found.parameters == sum(p.numel() for p in tiny.parameters())
    assert found.left_dense == {"outside the blocks": 1, "a convolution": 1}
    assert found.work.budgets == 0
    assert found.seconds > 0


def test_a_compression_that_whole_entries_do_not_give_is_said(tiny, caplog):
    plan = plan_compression(adapt(tiny, ImageInputs(32)), job_of("magnitude", MagnitudeConfig()), 8)
    plan.with_budgets(MagnitudeConfig(compression=0.9), None)
    assert not caplog.records
    plan.with_budgets(MagnitudeConfig(compression=0.995), None)
    assert "0.9844 of the weights will be removed, not 0.995" in caplog.text  # 1 of 48 in a row stays, and 1 of 192


def test_a_dry_run_writes_nothing(tiny_folder, flat_images, tmp_path, call):
    output = tmp_path / "out"
    status, out, _ = call(main, *f"--model local-dir:{tiny_folder} --data-dir {flat_images} -o {output} --dry-run".split())
    assert status == 0
    *lines, result = out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["coverage", "memory", "arithmetic", "time"]
    assert (json.loads(result)["dry_run"], json.loads(result)["n_layers"]) == (True, 12)
    assert list(tmp_path.iterdir()) == []
