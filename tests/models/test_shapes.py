"""Shapes of linear layers, and the tokens that pass them."""

from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs
from vitoats.models.shapes import LayerShape, layer_shapes


def test_shapes_of_a_model(tiny):
    shapes = layer_shapes(adapt(tiny, ImageInputs(32)))
    assert len(shapes) == 12
    assert shapes["blocks.1.attn.qkv"] == LayerShape(144, 48, 3, 17)
    assert shapes["blocks.1.mlp.fc2"] == LayerShape(48, 192, 1, 17)
    assert layer_shapes(adapt(tiny, ImageInputs(32)), fused_qkv=True)["blocks.1.attn.qkv"].parts == 1


def test_a_low_rank_term_has_a_v_for_each_part():
    shape = LayerShape(d_out=144, d_in=48, parts=3, tokens=17)
    assert shape.size == 144 * 48
    assert shape.low_rank_parameters(2) == 3 * (2 * (48 + 48))
