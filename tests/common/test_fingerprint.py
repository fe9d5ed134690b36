"""Fingerprints differ with whatever a run depends on."""

import numpy as np
import pytest
import torch

from tests.conftest import make_tiny
from vitoats.common.fingerprint import fingerprint, json_sha256, tensors_sha256


def test_a_fingerprint_sees_weights_and_settings():
    model = make_tiny()
    first, second = make_tiny().state_dict(), model.state_dict()
    assert fingerprint(first, {"a": 1, "b": (1, 2)}) == fingerprint(second, {"b": [1, 2], "a": 1})
    assert fingerprint(first, {"a": 1}) != fingerprint(second, {"a": 2})
    model.head.bias.data[0] += 1e-6
    assert fingerprint(first, {"a": 1}) != fingerprint(second, {"a": 1})


def test_settings_must_be_plain_values():
    """What is no JSON might have an address in its name, another one in each process."""
    with pytest.raises(TypeError):
        fingerprint({}, {"a": object()})


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 3), "b": torch.ones(4)[:3]},
        {"a": torch.zeros(3, 2), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(4)},
        {"b": torch.zeros(2, 3), "a": torch.ones(4)},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
    ],
)
def test_tensors_count_with_their_names_types_shapes_and_bytes(other):
    first = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    assert tensors_sha256(first) != tensors_sha256(other)


def test_how_tensors_lie_in_memory_plays_no_part():
    x = torch.arange(6.0).view(2, 3)
    assert tensors_sha256({"a": x, "b": x}) == tensors_sha256({"b": x.T.contiguous().T, "a": torch.stack([x, x])[1]})
    one = torch.tensor(1.0)
    assert tensors_sha256({"a": one.expand(1), "b": one.expand(2)}) == tensors_sha256({"a": torch.ones(1), "b": torch.ones(2)})
    assert tensors_sha256({"a": one, "b": one.expand(0)}) == tensors_sha256({"a": torch.ones(()), "b": torch.empty(0)})


def test_json_is_told_apart_by_what_it_says():
    assert json_sha256({"a": [1, 2.5, None]}) == json_sha256({"a": (1, 2.5, None)})
    assert len({json_sha256(v) for v in (0, False, "", None, [], {}, [[]], [0], "0", float(np.float64(0.5)))}) == 10
