"""vitoats methods and vitoats models."""

import pytest

from vitoats.cli.main import dispatch
from vitoats.common.errors import InputError


def test_every_method_is_listed_with_its_settings(capsys):
    found = dispatch(["methods"])["methods"]
    assert {"oats-h", "oats", "wanda", "sparsegpt", "numerical", "dass", "mrp"} <= found.keys()
    assert found["oats"]["settings"]["rank_ratio"] == 0.2
    assert found["oats-h"]["recipe"]["target"] == "residual"
    assert all(about["summary"].endswith(".") or len(about["summary"]) > 20 for about in found.values())
    assert "oats-h: OATS-H" in capsys.readouterr().out


def test_one_method():
    assert list(dispatch(["methods", "wanda", "--quiet"])["methods"]) == ["wanda"]


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown method 'wandaa': use one of alps, .*wanda"):
        dispatch(["methods", "wandaa"])


def test_our_own_names_and_those_of_timm_that_fit():
    assert {"dinov2s_derived", "dinov2_vitb14"} <= set(dispatch(["models"])["models"])
    names = dispatch(["models", "vit_small_patch14*dinov2*"])["models"]
    assert names
    assert all(name.startswith("vit_small_patch14") for name in names)


def test_a_pattern_that_nothing_fits_is_refused():
    with pytest.raises(InputError, match="no model of timm fits 'vit_hug'"):
        dispatch(["models", "vit_hug"])
