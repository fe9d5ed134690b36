"""A compressed layer survives its tensors bit by bit; tensors that do not belong together are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.format.test_layers import make
from vitoats.common.errors import InputError
from vitoats.format import factored
from vitoats.format.int8_layers import to_int8

parts = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=3)


FORMS = {
    "float": lambda layer: layer,
    "int8": lambda layer: to_int8(layer.float()),
    "dense int8": lambda layer: to_int8(layer.float().folded().requires_grad_(False)),
}


@given(parts=parts, d_in=st.integers(1, 20), bias=st.booleans(), seed=st.integers(0, 99), form=st.sampled_from(list(FORMS)))
def test_round_trip(parts, d_in, bias, seed, form):
    torch.manual_seed(seed)
    layer = make(parts, d_in, bias)
    layer = FORMS[form](layer)
    tensors = factored.pack("a.b", layer)
    kinds = factored.kinds("a.b", tensors.keys(), parts, d_in)
    assert tensors.keys() == kinds.keys()
    assert all(factored.same_shape(tensors[key].shape, kind.shape) and kind.fits(tensors[key]) for key, kind in kinds.items())
    again = factored.unpack("a.b", tensors | {"other": torch.zeros(1)}, parts, d_in)
    assert type(again) is type(layer)
    expected, found = layer.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_layer_shares_no_memory_with_the_tensors(form):
    """They may be a file's, mapped into memory."""
    tensors = factored.pack("l", FORMS[form](make([(6, 2)], 8, True)))
    layer = factored.unpack("l", tensors, [(6, 2)], 8)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for value in tensors.values():
        value.zero_()
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("l.S.values"),
        lambda t: t.pop("l.V.1"),
        lambda t: t.update({"l.U.0": torch.zeros(4, 3)}),
        lambda t: t.update({"l.V.0": torch.zeros(2, 9)}),
        lambda t: t.update({"l.bias": torch.zeros(5)}),
        lambda t: t.update({"l.S.mask": torch.zeros(8, 2, dtype=torch.uint8)}),
        lambda t: t.update({"l.S.mask": t["l.S.mask"].int()}),
        lambda t: t.update({"l.S.values": t["l.S.values"][:-1]}),
        lambda t: t.update({"l.S.values": t["l.S.values"][None]}),
        lambda t: t.update({"l.S.values": t["l.S.values"].long()}),
        lambda t: t.update({"l.U.0": t["l.U.0"].to(torch.complex64)}),
        lambda t: t["l.S.mask"].fill_(255),
    ],
    ids=range(12),
)
def test_tensors_that_do_not_belong_together_are_refused(change):
    refuse(make([(4, 2), (4, 2)], 8, True), change)


def refuse(layer, change):
    tensors = factored.pack("l", layer)
    change(tensors)
    with pytest.raises(InputError, match="damaged"):
        factored.unpack("l", tensors, [(4, 2), (4, 2)], 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("l.U.1.scale"),
        lambda t: t.pop("l.S.scale"),
        lambda t: t.update({"l.S.scale": t["l.S.scale"].double()}),
        lambda t: t.update({"l.S.scale": t["l.S.scale"][:, None]}),
        lambda t: t.update({"l.V.0.scale": torch.ones(8)}),
        lambda t: t.update({"l.V.0": t["l.V.0"].float()}),
        lambda t: t.update({"l.U.0": t["l.U.0"].view(torch.uint8)}),
        lambda t: t.update({"l.S.values": t["l.S.values"].float()}),
        lambda t: t["l.S.scale"].fill_(float("nan")),
        lambda t: t["l.U.0.scale"].fill_(float("inf")),
    ],
    ids=range(10),
)
def test_int8_tensors_that_do_not_belong_together_are_refused(change):
    refuse(FORMS["int8"](make([(4, 2), (4, 2)], 8, True)), change)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"l.weight": t["l.weight"].float()}),
        lambda t: t.update({"l.weight": t["l.weight"].T}),
        lambda t: t.update({"l.weight.scale": t["l.weight.scale"][1:]}),
        lambda t: t["l.weight.scale"].fill_(float("-inf")),
        lambda t: t.pop("l.weight"),
    ],
    ids=range(5),
)
def test_tensors_of_a_dense_int8_layer_that_do_not_belong_together_are_refused(change):
    refuse(FORMS["dense int8"](make([(4, 2), (4, 2)], 9, True)), change)


def test_scales_of_any_finite_value_are_taken():
    tensors = factored.pack("l", FORMS["int8"](make([(4, 2), (4, 2)], 8, True)))
    tensors["l.S.scale"][:2] = torch.tensor([0.0, -1.5])
    layer = factored.unpack("l", tensors, [(4, 2), (4, 2)], 8)
    assert layer.S_scale[:2].tolist() == [0, -1.5]
