"""A measured table of costs: of the model's shapes, and its parts add up to the whole."""

import copy
import json

import pytest
import torch

from vitoats.allocation.cost import CostTable
from vitoats.benchmark.costs import LOW_RANK, ZEROS, measure_costs, model_footprint
from vitoats.loading.load import load_model
from vitoats.models.adapter import adapt
from vitoats.models.shapes import layer_shapes


def test_a_table_is_of_its_model_and_leaves_it_alone(small_cache, tiny_folder, tmp_path):
    loaded = load_model(f"local-dir:{tiny_folder}")
    before, said = copy.deepcopy(loaded.model.state_dict()), []
    result = measure_costs(loaded, batch=2, threads=1, progress=lambda *step: said.append(step))
    assert json.loads(json.dumps(result)) == result
    assert loaded.model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())

    shapes = list(layer_shapes(adapt(loaded.timm_model, loaded.inputs)).values())
    distinct = len(set(shapes))
    assert len(result["rows"]) == distinct * (len(ZEROS) + len(LOW_RANK))
    for of_type, int8 in (("", False), ("int8_", True)):
        table = CostTable.from_json(result, int8)
        table.check(shapes, tmp_path)
        layers = sum(table.ms(shape, model_footprint(shape)) for shape in shapes)
        assert result[f"rest_{of_type}ms"] == pytest.approx(result[f"sparse_{of_type}ms"] - layers, abs=1e-3)
    assert [done for done, _, _ in said] == list(range(distinct + 1))
    assert said[-1][1:] == (distinct + 1, "whole models")
