"""Some rows of a compressed layer as a layer of its own, such as those of q in a fused qkv."""

from vitoats.format.int8_layers import Int8Linear, Int8SparseLowRankLinear
from vitoats.format.layers import CompressedLinear, SparseLowRankLinear

Layer = CompressedLinear | Int8Linear


def rows_of(layer: Layer, start: int, stop: int) -> Layer:
    """The layer that computes the outputs from ``start`` to before ``stop``."""
    if (start, stop) == (0, layer.out_features):
        return layer
    bias = None if layer.bias is None else layer.bias[start:stop]
    if isinstance(layer, Int8Linear):
        return Int8Linear((layer.weight_int8[start:stop], layer.weight_scale[start:stop]), bias)
    cuts = _cuts(layer, start, stop)
    if isinstance(layer, Int8SparseLowRankLinear):
        U = [(layer.U_int8[i][cut], layer.U_scale[i][cut]) for i, cut in cuts]
        V = [(layer.V_int8[i].data, layer.V_scale[i].data) for i, _ in cuts]
        return Int8SparseLowRankLinear((layer.S_int8[start:stop], layer.S_scale[start:stop]), U, V, bias)
    assert isinstance(layer, SparseLowRankLinear)
    all_U, all_V = list(layer.U), list(layer.V)
    return SparseLowRankLinear(layer.S[start:stop], [all_U[i][cut] for i, cut in cuts], [all_V[i] for i, _ in cuts], bias)


def _cuts(layer: CompressedLinear, start: int, stop: int) -> list[tuple[int, slice]]:
    """The parts of a layer that have some of these rows, each with which of its own rows these are."""
    found, first = [], 0
    for i, (height, _) in enumerate(layer.parts):
        cut = slice(max(start - first, 0), min(stop - first, height))
        if cut.start < cut.stop:
            found.append((i, cut))
        first += height
    return found
