"""Random layers hold what a method would leave, and the model is otherwise the dense one."""

import numpy as np
import torch

from vitoats.allocation.cost import footprint
from vitoats.benchmark.random_layers import of_budget, with_random_layers
from vitoats.format.layers import compressed_layers
from vitoats.loading.load import load_model
from vitoats.methods.oats import OATSConfig
from vitoats.models.adapter import adapt
from vitoats.models.shapes import layer_shapes


def test_random_layers_hold_what_oats_leaves(tiny_folder):
    loaded, config = load_model(f"local-dir:{tiny_folder}"), OATSConfig(compression=0.5, rank_ratio=0.25)
    small = with_random_layers(loaded, of_budget(config), "row", np.random.default_rng(0))
    shapes = layer_shapes(adapt(loaded.timm_model, loaded.inputs))
    layers = compressed_layers(small.timm_model)
    assert list(layers) == list(shapes)
    assert compressed_layers(loaded.timm_model) == {}
    for name, layer in layers.items():
        expected = footprint(shapes[name], config)
        assert (layer.nonzeros, layer.kept_parameters) == (expected.nonzeros, expected.parameters)
        assert len({int(n) for n in (layer.S != 0).sum(dim=1)}) == 1
    dense, kept = loaded.model.state_dict(), small.model.state_dict()
    assert all(torch.equal(kept[name], dense[name]) for name in dense if name in kept)
