"""A compressed layer survives its tensors bit by bit; tensors that do not belong together are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.format.test_layers import make
from vitoats.common.errors import InputError
from vitoats.format import factored

parts = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=3)


@given(parts=parts, d_in=st.integers(1, 20), bias=st.booleans(), seed=st.integers(0, 99))
def test_round_trip(parts, d_in, bias, seed):
    torch.manual_seed(seed)
    layer = make(parts, d_in, bias)
    tensors = factored.pack("a.b", layer)
    shapes = factored.shapes("a.b", parts, d_in, bias)
    assert tensors.keys() == shapes.keys()
    assert all(factored.same_shape(tensors[key].shape, shape) for key, shape in shapes.items())
    again = factored.unpack("a.b", tensors | {"other": torch.zeros(1)}, parts, d_in)
    expected, found = layer.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_layer_shares_no_memory_with_the_tensors():
    """They may be a file's, mapped into memory."""
    tensors = factored.pack("l", make([(6, 2)], 8, True))
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
    tensors = factored.pack("l", make([(4, 2), (4, 2)], 8, True))
    change(tensors)
    with pytest.raises(InputError, match="damaged"):
        factored.unpack("l", tensors, [(4, 2), (4, 2)], 8)
