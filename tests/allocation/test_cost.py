"""Costs of layers: hand-made tables, bytes against really exported files, and goals that budgets meet."""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.allocation.constraint import Constraint
from vitoats.allocation.cost import CostTable, LayerFootprint, exported_bytes, exported_dense, exported_int8_bytes, footprint
from vitoats.allocation.lagrange import LEAST_KEPT
from vitoats.allocation.sensitivity import RATES, Sensitivity
from vitoats.common.errors import InputError
from vitoats.compression.constraints import GRAPH_BYTES, NODE_BYTES
from vitoats.data.transforms import Preprocessing
from vitoats.export.onnx_file import export_onnx
from vitoats.format.layers import compressed_layers
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.magnitude import MagnitudeConfig
from vitoats.methods.oats import OATSConfig
from vitoats.methods.oats_h import OATSHConfig
from vitoats.methods.svd import SVDConfig
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs
from vitoats.models.shapes import LayerShape, layer_shapes
from vitoats.runtime.inference import session

SHAPE = LayerShape(d_out=96, d_in=48, parts=3, tokens=17)
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def table(rows, shape=SHAPE, layers=1, dense_ms=1.0, model_ms=3.0, rest_ms=0.5, int8=0.25) -> dict:
    """The JSON of a table with one shape, from (zeros, rank, ms); all times in int8 are shorter by a factor."""
    common = {"n": shape.d_out, "k": shape.d_in, "blocks": shape.parts, "tokens": shape.tokens, "layers": layers}
    common |= {"dense_ms": dense_ms, "dense_int8_ms": int8 * dense_ms}
    return {
        "processor": "made by hand",
        "threads": 1,
        "batch": 1,
        "dense_ms": model_ms,
        "rest_ms": rest_ms,
        "rest_int8_ms": int8 * rest_ms,
        "rows": [
            common | {"zeros": zeros, "rank": rank, "sparse_ms": ms, "sparse_int8_ms": int8 * ms} for zeros, rank, ms in rows
        ],
    }


def ms(rows, density, low_rank=0) -> float:
    return CostTable.from_json(table(rows)).ms(SHAPE, LayerFootprint(round(density * SHAPE.size), low_rank))


# ---- interpolation


def test_lines_between_densities_and_beyond():
    rows = [(75, 0, 0.4), (50, 0, 0.8), (25, 0, 1.4)]
    assert ms(rows, 0.25) == pytest.approx(0.4)
    assert ms(rows, 0.375) == pytest.approx(0.6)
    assert ms(rows, 0.625) == pytest.approx(1.1)
    assert ms(rows, 0.875) == pytest.approx(1.7)  # as the last two
    assert ms(rows, 0.125) == pytest.approx(0.2)  # as the first two
    assert ms([(75, 0, 0.2), (50, 0, 0.8)], 0.125) == 0  # but never below nothing


def test_noise_never_makes_more_values_cheaper():
    assert ms([(75, 0, 0.5), (50, 0, 0.4), (25, 0, 0.9)], 0.5) == pytest.approx(0.5)


def test_a_low_rank_term_is_a_straight_line():
    per_rank = 96 + 3 * 48
    rows = [(75, 0, 0.4), (50, 0, 0.8), (62.5, 2, 0.6 + 0.05 + 0.02), (62.5, 6, 0.6 + 0.05 + 0.06)]
    assert ms(rows, 0.375, 4 * per_rank) == pytest.approx(0.6 + 0.05 + 0.04)
    assert ms(rows, 0.25, per_rank) == pytest.approx(0.4 + 0.05 + 0.01)
    assert ms(rows, 0.25) == pytest.approx(0.4)


@pytest.mark.parametrize("added", [(0.02, 0.01), (-0.01, 0.05)])
def test_a_line_that_noise_bent_goes_through_the_origin(added):
    """Neither less time for a larger rank nor less than nothing at rank 0."""
    rows = [(75, 0, 0.4), (50, 0, 0.8), (75, 2, 0.4 + added[0]), (75, 6, 0.4 + added[1])]
    slope = (2 * added[0] + 6 * added[1]) / 40
    assert ms(rows, 0.25, 4 * (96 + 3 * 48)) == pytest.approx(0.4 + max(0, 4 * slope))


def test_a_layer_that_keeps_nearly_all_costs_a_dense_product():
    rows = [(75, 0, 0.4), (50, 0, 0.8)]
    edge = SHAPE.size - 96 * 6 // 4  # values and mask take as many bytes as the matrix
    assert exported_dense(SHAPE, LayerFootprint(edge, 0))
    assert not exported_dense(SHAPE, LayerFootprint(edge - 1, 0))
    assert ms(rows, 1.0) == 1.0
    assert ms(rows, (edge - 1) / SHAPE.size) > 1.4
    assert exported_bytes(SHAPE, LayerFootprint(edge, 0)) == 4 * SHAPE.size
    assert exported_bytes(SHAPE, LayerFootprint(edge - 1, 0)) == 4 * SHAPE.size - 4


def test_the_times_of_int8_are_read_from_the_same_table():
    rows, half = [(75, 0, 0.4), (50, 0, 0.8), (75, 4, 0.6)], LayerFootprint(SHAPE.size // 2, 0)
    found = CostTable.from_json(table(rows, dense_ms=2.0, int8=0.5), int8=True)
    assert (found.dense_ms, found.rest_ms) == (3.0, 0.25)
    assert found.ms(SHAPE, half) == pytest.approx(0.4)
    assert found.ms(SHAPE, LayerFootprint(SHAPE.size // 4, SHAPE.low_rank_parameters(4))) == pytest.approx(0.3)
    assert found.times[SHAPE].dense_ms == 2.0
    edge = SHAPE.size - 96 * 48 // 8  # values of one byte each, and the mask, take as many bytes as the matrix
    assert exported_dense(SHAPE, LayerFootprint(edge, 0), int8=True)
    assert not exported_dense(SHAPE, LayerFootprint(edge - 1, 0), int8=True)
    assert found.ms(SHAPE, LayerFootprint(edge, 0)) == 1.0


def test_int8_bytes_by_hand():
    """96 x 48 in three parts, as the operator's constants: strips of 16 rows, quads of 4 columns."""
    rank = 5
    kept = LayerFootprint(1000, SHAPE.low_rank_parameters(rank))
    U, V, mask = 96 * 8, 3 * 16 * 48, 96 * 48 // 8
    assert exported_int8_bytes(SHAPE, kept) == 1000 + mask + U + V + 4 * (96 + 96 + 3 * rank)
    without = exported_int8_bytes(SHAPE, LayerFootprint(1000, 0))  # a low-rank term of zeros, of rank 1
    assert without == 1000 + mask + 96 * 4 + 3 * 16 * 48 + 4 * (96 + 96 + 3)
    assert exported_int8_bytes(SHAPE, LayerFootprint(SHAPE.size, 0)) == SHAPE.size + 4 * 96
    edge = SHAPE.size - mask
    assert exported_int8_bytes(SHAPE, LayerFootprint(edge, 0)) == SHAPE.size + 4 * 96  # dense, as it is no larger
    uneven = LayerShape(d_out=10, d_in=7, parts=1, tokens=3)
    assert exported_int8_bytes(uneven, LayerFootprint(20, 0)) == 20 + 16 * 8 // 8 + 16 * 4 + 16 * 8 + 4 * (10 + 10 + 1)
    assert exported_int8_bytes(uneven, LayerFootprint(70, 0)) == 16 * 8 + 40


@given(st.floats(0.02, 0.95), st.floats(0.001, 0.04), st.integers(0, 8))
def test_more_always_costs_more(density, step, rank):
    rows = [(95, 0, 0.1), (75, 0, 0.35), (50, 0, 0.8), (25, 0, 1.1), (70, 3, 0.5), (70, 6, 0.55)]
    low_rank, larger = (SHAPE.low_rank_parameters(r) for r in (rank, rank + 1))
    if exported_dense(SHAPE, LayerFootprint(round((density + step) * SHAPE.size), larger)):
        return  # where it may be faster again
    less, more = ms(rows, density, low_rank), ms(rows, density + step, low_rank)
    assert less <= more <= ms(rows, density + step, larger) + 1e-12


# ---- tables that do not fit


def test_a_table_of_another_model_is_refused(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(table([(75, 0, 0.4), (50, 0, 0.8)], layers=2)))
    read = CostTable.read(path)
    read.check([SHAPE, SHAPE], path)
    for others in ([SHAPE], [SHAPE, SHAPE, LayerShape(48, 48, 1, 17)], [replace(SHAPE, tokens=50)] * 2):
        with pytest.raises(InputError, match=r"tools/benchmark\.py op --model NAME --results-file"):
            read.check(others, path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": []}', '{"rows": [{"n": 3}]}', "null"])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(InputError, match=r"tools/benchmark\.py op --model NAME"):
        CostTable.read(tmp_path / "costs.json")
    (tmp_path / "costs.json").write_text(json.dumps(table([(75, 0, 0.4), (50, 0, 0.8)]) | {"rest_int8_ms": None}))
    assert CostTable.read(tmp_path / "costs.json").rest_ms == 0.5
    with pytest.raises(InputError, match="rest_int8_ms"):
        CostTable.read(tmp_path / "costs.json", int8=True)
    with pytest.raises(InputError, match="cannot be read"):
        CostTable.read(tmp_path / "missing.json")


def changed(**values):
    return table([(75, 0, 0.4), (50, 0, 0.8)]) | values


def changed_row(*without, **values):
    rows = table([(75, 0, 0.4), (50, 0, 0.8)])["rows"]
    return changed(rows=[{k: v for k, v in (rows[0] | values).items() if k not in without}, rows[1]])


@pytest.mark.parametrize(
    "result",
    [
        # whole tables
        [],
        {},
        None,
        "table",
        changed(rows=[]),
        changed(rows={}),
        changed(rows=[3]),
        changed(rows=None),
        changed(dense_ms=0),
        changed(dense_ms=-1.0),
        changed(dense_ms="3"),
        changed(dense_ms=None),
        changed(dense_ms=10**400),
        changed(rest_ms=None),
        changed(threads=0),
        changed(threads=1.5),
        changed(batch=-1),
        changed(processor=3),
        # rows
        changed_row("sparse_ms"),
        changed_row("layers"),
        changed_row(sparse_ms=0),
        changed_row(sparse_ms=-0.4),
        changed_row(sparse_ms=[0.4]),
        changed_row(sparse_ms=True),
        changed_row(dense_ms=0.0),
        changed_row(dense_ms=2.0),  # in one row of two
        changed_row(layers=2),
        changed_row(layers=-1),
        changed_row(zeros=100),
        changed_row(zeros=-1),
        changed_row(zeros=50),  # a row twice
        changed_row(rank=-1),
        changed_row(rank=0.5),
        changed_row(n=0),
        changed_row(n="64"),
        changed_row(blocks=7),
        changed_row(tokens=None),
    ],
)
def test_tables_that_cannot_be_are_refused_in_one_line(tmp_path, result):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(result))
    with pytest.raises(InputError, match="holds no cost table") as error:
        CostTable.read(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"", b'{"dense_ms": NaN}', b'{"rows": ' + b"1" * 5000 + b"}"])
def test_files_that_are_no_json_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "costs.json").write_bytes(content)
    with pytest.raises(InputError, match="holds no cost table"):
        CostTable.read(tmp_path / "costs.json")


def test_a_time_that_is_no_number_is_refused(tmp_path):
    path = tmp_path / "costs.json"
    for wrong in ("NaN", "Infinity", "-Infinity"):
        path.write_text(json.dumps(changed(dense_ms=123.0)).replace("123.0", wrong))
        with pytest.raises(InputError, match="holds no cost table"):
            CostTable.read(path)


def test_a_kept_table_of_another_model_is_told():
    result = table([(75, 0, 0.4), (50, 0, 0.8)], layers=2)
    assert CostTable.of_model(result, [SHAPE, SHAPE]).times
    with pytest.raises(ValueError, match="2 layers"):
        CostTable.of_model(result, [SHAPE])


def test_a_table_needs_two_densities():
    with pytest.raises(ValueError, match="two densities"):
        CostTable.from_json(table([(75, 0, 0.4), (75, 4, 0.8)]))


# ---- what layers hold


CONFIGS = [
    OATSConfig(compression=0.6, rank_ratio=0.25, iterations=2),
    OATSConfig(compression=0.5, rank_ratio=0.3, pattern="layer", iterations=2),
    OATSConfig(compression=0.5, rank_ratio=0.0, pattern="1x4", iterations=2),
    MagnitudeConfig(compression=0.7),
    SVDConfig(compression=0.5),
]
METHODS = ["oats", "oats", "oats", "magnitude", "svd"]


@pytest.mark.parametrize(("method", "config"), list(zip(METHODS, CONFIGS, strict=True)))
@pytest.mark.parametrize("fused", [False, True])
def test_content_is_what_a_method_leaves(tiny, method, config, fused):
    shapes = layer_shapes(adapt(tiny, ImageInputs(32)), fused)
    compress_in_place(tiny, IMAGES, job_of(method, config, fused_qkv=fused))
    for name, layer in compressed_layers(tiny).items():
        expected = footprint(shapes[name], config)
        assert (layer.nonzeros, layer.kept_parameters) == (expected.nonzeros, expected.parameters)


# ---- goals


def goal(unit="MB", limit=0.0, cost=None, config=None, free=True, model=None, rest=0.0) -> Constraint:
    """Of the tiny model."""
    layers = layer_shapes(adapt(model or make_tiny(), ImageInputs(32)))
    cost = cost or (lambda shape, kept: exported_bytes(shape, kept) / 1e6)
    dense = rest + sum(cost(shape, LayerFootprint(shape.size, 0)) for shape in layers.values())
    asked = {"max_mb": limit} if unit == "MB" else {"max_ms": limit}
    return Constraint(asked, unit, limit, dense, rest, layers, cost, config or OATSConfig(iterations=3), free)


def sensitivities(layers, seed=0) -> list[Sensitivity]:
    """Errors that differ from layer to layer, with and without a low-rank term."""
    random = np.random.default_rng(seed)
    found = []
    for name, shape in layers.items():
        scale, speed = random.uniform(0.01, 1), random.uniform(3, 8)
        errors = tuple(float(scale * np.exp(-speed * (1 - rate))) for rate in RATES)
        found.append(Sensitivity(name, shape.size, errors, errors[2] * float(random.choice([0.5, 3]))))
    return found


@settings(max_examples=10, deadline=None)
@example(0.15625, 1)
@given(st.floats(0.15, 0.95), st.integers(0, 5))
def test_budgets_meet_the_goal_and_use_it(share, seed):
    whole = goal().dense
    wanted = goal(limit=share * whole)
    wanted.check("sensitivity")
    budgets = wanted.allocate(sensitivities(wanted.layers, seed))
    footprints = wanted.footprints(wanted.config, budgets)
    predicted = wanted.predicted(footprints)
    if not any(kept.low_rank for kept in footprints.values()):  # a rank of 1 in each layer was paid for, which is much here
        predicted += sum(4 * shape.low_rank_parameters(1) for shape in wanted.layers.values()) / 1e6
        assert predicted > 0.97 * share * whole
    else:
        assert 0.97 * share * whole < predicted <= share * whole * (1 + 1e-9)  # a rank of one layer is a percent here


def test_rank_ratios_differ_unless_one_is_given():
    whole = goal().dense
    free = goal(limit=0.5 * whole)
    ratios = {b["rank_ratio"] for b in free.allocate(sensitivities(free.layers)).values()}
    assert ratios == {0.2, 0.0}
    given = goal(limit=0.5 * whole, free=False)
    for budget in given.allocate(sensitivities(given.layers)).values():
        assert budget["rank_ratio"] == (0.2 if budget["compression"] else 0.0)
    without = goal(limit=0.5 * whole, config=MagnitudeConfig())
    assert all(b.keys() == {"compression"} for b in without.allocate(sensitivities(without.layers)).values())


def test_one_compression_for_all_layers():
    whole = goal().dense
    wanted = goal(limit=0.5 * whole)
    rho = wanted.uniform()
    config = replace(wanted.config, compression=rho)
    predicted = wanted.predicted(wanted.footprints(config, None))
    assert 0.96 * wanted.limit < predicted <= wanted.limit
    assert wanted.compression(wanted.footprints(config, None)) == pytest.approx(rho, abs=0.02)


@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_what_cannot_be_reached_is_refused_with_what_can(allocation):
    whole = goal().dense
    with pytest.raises(InputError, match=r"`max_mb=.*` asks for nothing"):
        goal(limit=whole).check(allocation)
    with pytest.raises(InputError, match="ask for at least") as refusal:
        goal(limit=0.05 * whole).check(allocation)
    least = float(str(refusal.value).split("at least ")[1].split(" MB")[0])
    with pytest.raises(InputError):
        goal(limit=0.99 * least).check(allocation)
    reached = goal(limit=1.01 * least)
    reached.check(allocation)
    if allocation == "sensitivity":
        kept = [1 - b["compression"] for b in reached.allocate(sensitivities(reached.layers)).values()]
    else:
        kept = [1 - reached.uniform()]
    assert min(kept) >= LEAST_KEPT - 1e-9
    assert sum(kept) / len(kept) < 0.12


def test_dense_layers_where_sparse_ones_are_slower():
    """With times that sparsity pays for only from 40 % zeros on, no layer is left in between."""
    rows = [(75, 0, 0.4), (50, 0, 0.9), (25, 0, 1.4), (75, 4, 0.5)]
    times = {}
    for shape in set(goal().layers.values()):
        times |= CostTable.from_json(table(rows, shape)).times
    costs = CostTable("", 1, 1, 12.0, 0.0, times)
    wanted = goal("ms", 11.0, costs.ms)
    assert wanted.dense == 12
    budgets = wanted.allocate(sensitivities(wanted.layers))
    removed = [b["compression"] for b in budgets.values()]
    assert removed.count(0.0) >= 6
    assert all(rho == 0 or rho > 0.4 for rho in removed)
    assert wanted.predicted(wanted.footprints(wanted.config, budgets)) <= 11


def int8_goal(limit, dense_ms, config=None) -> Constraint:
    """Of the tiny model in milliseconds of int8 layers, where a sparse layer takes 0.4 ms at 75 % zeros and 0.9 at 50 %."""
    rows = [(75, 0, 0.4), (50, 0, 0.9), (25, 0, 1.4), (75, 4, 0.5)]
    times = {}
    for shape in set(goal().layers.values()):
        times |= CostTable.from_json(table(rows, shape, dense_ms=dense_ms, int8=1.0), int8=True).times
    costs = CostTable("", 1, 1, 50.0, 0.0, times)
    return replace(goal("ms", limit, costs.ms, config), dense=50.0, int8=True)


def test_int8_layers_are_dense_where_that_is_best():
    """Dense products of 0.7 ms, which lose nothing: no layer is sparse and slower, and 10 ms are too much for 12 of them."""
    wanted = int8_goal(8.0, 0.7)
    wanted.check("sensitivity")
    budgets = wanted.allocate(sensitivities(wanted.layers))
    removed = [b["compression"] for b in budgets.values()]
    assert 0 < removed.count(0.0) < 12
    assert all(
        rho == 0 or wanted.layer_cost(name, 1 - rho, b["rank_ratio"]) < 0.7
        for (name, b), rho in zip(budgets.items(), removed, strict=True)
    )
    assert wanted.predicted(wanted.footprints(wanted.config, budgets)) <= 8


@pytest.mark.parametrize("config", [OATSConfig(iterations=3), MagnitudeConfig()])
def test_nothing_is_removed_where_dense_int8_is_fast_enough(config):
    """Even where sparse layers could never cost as much as the limit allows."""
    for limit in (8.5, 40.0):
        wanted = int8_goal(limit, 0.7, config)
        wanted.check("sensitivity")
        budgets = wanted.allocate(sensitivities(wanted.layers))
        assert {b["compression"] for b in budgets.values()} == {0.0}
        assert wanted.uniform() == 0
        footprints = wanted.footprints(replace(config, compression=wanted.uniform()), None)
        assert wanted.predicted(footprints) == pytest.approx(12 * 0.7)
        assert wanted.compression(footprints) == 0


@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_dense_int8_layers_count_in_what_can_be_reached(allocation):
    """Sparse layers take 0.4 ms or more here with the least weights, dense ones 0.01."""
    int8_goal(0.13, 0.01).check(allocation)
    with pytest.raises(InputError, match=r"at least 0\.12 ms"):
        int8_goal(0.1, 0.01).check(allocation)


# ---- exported files


@pytest.mark.parametrize("mixed", [False, True])
def test_predicted_bytes_are_those_of_the_exported_file(tmp_path, mixed):
    """Mixed: layers with a low-rank term, layers without, and one that stays dense."""
    model = make_tiny()
    names = list(goal(model=model).layers)
    budgets = {name: {"compression": 0.6, "rank_ratio": 0.0 if mixed and i % 2 else 0.25} for i, name in enumerate(names)}
    if mixed:
        budgets[names[5]] = {"compression": 0.0, "rank_ratio": 0.0}
    others = sum(p.numel() for p in model.parameters()) - sum(s.size for s in goal(model=model).layers.values())
    rest = (4 * others + GRAPH_BYTES + NODE_BYTES * len(names)) / 1e6
    wanted = goal(model=model, rest=rest)
    predicted = wanted.predicted(wanted.footprints(wanted.config, budgets))
    compress_in_place(model, IMAGES, job_of("oats", wanted.config), budgets)
    loaded = LoadedModel("tiny", model, Preprocessing(img_size=32), "random")
    proto = export_onnx(loaded, tmp_path / "model.onnx")
    weights = sum(len(t.raw_data) for t in proto.graph.initializer if t.data_type != onnx.TensorProto.INT64) / 1e6
    expected = predicted - (GRAPH_BYTES + NODE_BYTES * len(names)) / 1e6
    assert weights == pytest.approx(expected, rel=0.001) or (mixed and 0.98 * expected < weights < expected)  # equal zeros once
    size = (tmp_path / "model.onnx").stat().st_size / 1e6
    assert predicted - 0.03 < size <= predicted


def test_a_layer_that_keeps_all_is_a_plain_product(tmp_path):
    """Its weights are those of the dense model; the others' nodes stay sparse, and the file runs as torch does."""
    model = make_tiny(depth=1)
    before = copy.deepcopy(model)
    names = ["blocks.0.attn.qkv"]
    budgets = {name: {"compression": 0.0, "rank_ratio": 0.0} for name in names}
    compress_in_place(model, IMAGES, job_of("oats-h", OATSHConfig(iterations=5)), budgets)
    for name in names:
        assert torch.equal(compressed_layers(model)[name].weight, before.get_submodule(name).weight)
    loaded = LoadedModel("tiny", model, Preprocessing(img_size=32), "random")
    proto = export_onnx(loaded, tmp_path / "model.onnx")
    sparse = {node.name for node in proto.graph.node if node.op_type == "SparseMatMul"}
    opened = session(tmp_path / "model.onnx")
    assert len(sparse) == 3
    assert sparse <= set(opened.native_nodes)
    with torch.inference_mode():
        expected = model(IMAGES).numpy()
    assert np.abs(opened.run(None, {"images": IMAGES.numpy()})[0] - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_model_of_dense_layers_alone_has_no_operator(tmp_path):
    model = make_tiny(depth=1)
    compress_in_place(model, IMAGES, job_of("magnitude", MagnitudeConfig(compression=0.0)))
    loaded = LoadedModel("tiny", model, Preprocessing(img_size=32), "random")
    proto = export_onnx(loaded, tmp_path / "model.onnx")
    assert not proto.functions
    assert all(node.domain == "" for node in proto.graph.node)
