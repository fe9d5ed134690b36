"""--speedup, --max-ms and --max-mb of compress, and the tables of costs behind them. Never how long anything took."""

import json

import pytest
import torch

import vitoats
from tests.conftest import write_image
from tests.jobs import weights
from vitoats.allocation.cost import CostTable, LayerFootprint, LayerShape, exported_int8_bytes
from vitoats.cli.compress import main as compress
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.common import cache, unfinished
from vitoats.common.errors import RunError
from vitoats.compression.constraints import GRAPH_BYTES, NODE_BYTES
from vitoats.format import factored
from vitoats.format.int8_layers import int8_linears
from vitoats.format.layers import compressed_layers
from vitoats.loading.checkpoint import about

SHAPES = [LayerShape(144, 48, 3, 17), LayerShape(48, 48, 1, 17), LayerShape(192, 48, 1, 17), LayerShape(48, 192, 1, 17)]
DENSE_MS, REST_MS = 10.0, 1.0
INT8 = 0.3  # the time of an int8 layer, or of the rest of an int8 model, as a share of that in float32


@pytest.fixture
def job(tiny_folder, image_tree, tmp_path):
    flags = f"--model local-dir:{tiny_folder} --data-dir {image_tree} --output {tmp_path / 'out'} --nsamples 12 --threads 1"
    return flags.split()


@pytest.fixture
def costs(tmp_path):
    """A table of the tiny model, made by hand: a layer's time is that of its values, and sparse ones are slow above 60 %."""
    rows = []
    for shape in SHAPES:
        common_part = {"n": shape.d_out, "k": shape.d_in, "blocks": shape.parts, "tokens": shape.tokens, "layers": 3}
        dense_ms = (DENSE_MS - REST_MS) * shape.size / (3 * sum(s.size for s in SHAPES))
        for zeros, rank in ((25, 0), (50, 0), (75, 0), (95, 0), (70, 4)):
            values = (1 - zeros / 100) * shape.size + shape.low_rank_parameters(rank)
            ms = dense_ms * values / (0.6 * shape.size)
            times = {"dense_ms": dense_ms, "sparse_ms": ms, "dense_int8_ms": INT8 * dense_ms, "sparse_int8_ms": INT8 * ms}
            rows.append({**common_part, "zeros": zeros, "rank": rank, **times})
    path = tmp_path / "costs.json"
    model = {"dense_ms": DENSE_MS, "rest_ms": REST_MS, "rest_int8_ms": INT8 * REST_MS}
    path.write_text(json.dumps({"processor": "by hand", "threads": 1, "batch": 1, **model, "rows": rows}))
    return path


def predicted_ms(folder, table) -> float:
    """By the table, from what the layers of a folder really hold; those without a low-rank term export one of rank 1."""
    model = vitoats.load(folder)
    layers = compressed_layers(model)
    some = any(layer.rank for layer in layers.values())
    total = REST_MS
    for layer in layers.values():
        shape = next(s for s in SHAPES if (s.d_out, s.d_in) == (layer.out_features, layer.in_features))
        low_rank = layer.kept_parameters - layer.nonzeros
        if some and layer.nonzeros < shape.size:
            low_rank = max(low_rank, shape.low_rank_parameters(1))
        total += CostTable.read(table).ms(shape, LayerFootprint(layer.nonzeros, low_rank))
    return total


# ---- goals


def test_a_speedup_with_measured_budgets(succeed, job, costs, tmp_path):
    result = succeed(compress, *job, "--method", "oats-h", "--iterations", "5", "--speedup", "1.5", "--cost-table", costs)
    assert 1.5 <= result["predicted_speedup"] < 1.55
    assert result["predicted_ms"] == pytest.approx(predicted_ms(tmp_path / "out", costs), abs=1e-3)
    said = about(tmp_path / "out")
    assert said["goal"]["speedup"] == 1.5
    assert said["goal"]["dense"] == DENSE_MS
    assert said["predicted"] == {key: result[key] for key in ("predicted_ms", "predicted_speedup")}
    assert said["config"]["compression"] == result["compression"]
    assert {b["rank_ratio"] for b in said["budgets"].values()} <= {0.0, 0.25}
    assert len({b["compression"] for b in said["budgets"].values()}) > 1


def test_a_given_rank_ratio_is_that_of_all_sparse_layers(succeed, job, costs, tmp_path):
    flags = ["--method", "oats-h", "--iterations", "5", "--rank-ratio", "0.2", "--max-ms", "6", "--cost-table", costs]
    result = succeed(compress, *job, *flags)
    assert 5.8 < result["predicted_ms"] <= 6
    budgets = about(tmp_path / "out")["budgets"].values()
    assert all(b["rank_ratio"] == (0.2 if b["compression"] else 0.0) for b in budgets)


@pytest.mark.parametrize("method", ["oats", "wanda", "svd"])
@pytest.mark.parametrize("fused", [[], ["--fused-qkv"]])
def test_a_speedup_with_one_compression_for_all(succeed, job, costs, tmp_path, method, fused):
    result = succeed(compress, *job, "--method", method, "--speedup", "1.8", "--cost-table", costs, *fused)
    assert 1.8 <= result["predicted_speedup"] < 1.9
    assert result["predicted_ms"] == pytest.approx(predicted_ms(tmp_path / "out", costs), abs=1e-3)
    assert about(tmp_path / "out")["budgets"] is None


@pytest.mark.parametrize("method", ["oats-h", "wanda"])
def test_milliseconds_of_int8_layers_choose_between_dense_and_sparse_ones(succeed, job, costs, tmp_path, method):
    """Dense int8 layers take 3 ms in all."""
    flags = [*job, "--method", method, "--weights", "int8", "--cost-table", costs, "--overwrite"]
    flags += ["--iterations", "5"] if method == "oats-h" else []
    kinds = {}
    for limit in (3.1, 1.8):
        result = succeed(compress, *flags, "--max-ms", limit)
        assert result["predicted_ms"] <= limit
        model = vitoats.load(tmp_path / "out")
        kinds[limit] = len(int8_linears(model)), len(compressed_layers(model))
        assert sum(kinds[limit]) == 12
    assert kinds[3.1] == (12, 0)
    assert kinds[1.8][1] > 0
    assert result["predicted_ms"] > 1.7


def test_a_table_without_int8_is_refused_for_int8_weights(refuse, job, costs):
    costs.write_text(costs.read_text().replace("_int8_ms", "_ms2"))
    line = refuse(compress, *job, "--method", "wanda", "--weights", "int8", "--speedup", "4", "--cost-table", costs)
    assert "rest_int8_ms" in line
    assert "tools/benchmark.py op --model NAME" in line


def test_megabytes_of_the_exported_file(succeed, job, tmp_path):
    result = succeed(compress, *job, "--method", "wanda", "--max-mb", "0.25")
    assert 0.24 < result["predicted_mb"] <= 0.25
    exported = succeed(export_onnx, tmp_path / "out", "-o", tmp_path / "m.onnx")
    assert 0.2 < exported["onnx_mb"] <= result["predicted_mb"]


@pytest.mark.parametrize("method", ["wanda", "oats"])
def test_megabytes_with_int8_weights(succeed, refuse, job, tmp_path, method):
    """The folder holds the same numbers as the exported file, without the padding of its layout and without its graph."""
    flags = [*job, "--method", method, "--iterations", "2"] if method == "oats" else [*job, "--method", method]
    flags += ["--weights", "int8"]
    dense = refuse(compress, *flags, "--max-mb", "10").split("the dense int8 model takes ")[1].split(" ")[0]
    limit = 0.9 * float(dense)
    result = succeed(compress, *flags, "--max-mb", limit)
    assert 0.97 * limit < result["predicted_mb"] <= limit
    layers = compressed_layers(vitoats.load(tmp_path / "out"))
    shapes = {(shape.d_out, shape.d_in): shape for shape in SHAPES}
    padded = sum(
        exported_int8_bytes(shapes[x.out_features, x.in_features], LayerFootprint(x.nonzeros, x.kept_parameters - x.nonzeros))
        for x in layers.values()
    )
    stored = sum(sum(t.nbytes for t in factored.pack("", layer).values()) - layer.bias.nbytes for layer in layers.values())
    exported = about(tmp_path / "out")["counts"]["bytes"] + padded - stored + GRAPH_BYTES + 12 * NODE_BYTES
    assert result["predicted_mb"] == pytest.approx(exported / 1e6, rel=0.02)


def test_goals_come_from_a_recipe_and_flags_beat_it(succeed, refuse, job, costs, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: wanda\nspeedup: 1.4\ncost_table: {costs}\n")
    assert succeed(compress, *job, "--config", recipe)["predicted_speedup"] == pytest.approx(1.4, abs=0.05)
    again = [*job, "--config", recipe, "--overwrite"]
    assert succeed(compress, *again, "--max-ms", "5")["predicted_ms"] == pytest.approx(5, abs=0.2)
    recipe.write_text("method: wanda\ncompression: 0.3\n")
    faster = succeed(compress, *again, "--speedup", "1.4", "--cost-table", costs)
    assert faster["predicted_speedup"] == pytest.approx(1.4, abs=0.05)
    recipe.write_text("compression: 0.3\nspeedup: 1.4\n")
    assert "exclude each other" in refuse(compress, *again)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--speedup 1.5 --compression 0.5", "not allowed with"),
        ("--speedup 1.5 --max-mb 3", "not allowed with"),
        ("--max-ms 1 --max-mb 3", "not allowed with"),
        ("--speedup 0", "above 0"),
        ("--max-mb -1", "above 0"),
        ("--compression 0.5 --cost-table COSTS", "leave it out"),
        ("--max-mb 0.2 --cost-table COSTS", "leave it out"),
        ("--max-mb 0.2 --pattern 2:4", "2:4 fixes what is removed"),
        ("--max-mb 0.2 --format dense", "--format dense"),
        ("--max-mb 0.2 --allocation owl", "--allocation sensitivity"),
        ("--max-mb 0.2 --method numerical", "give --compression"),
        ("--max-mb 0.01", "ask for at least 0."),
        ("--max-mb 10", "the dense model takes 0."),
        ("--speedup 1 --cost-table COSTS", "the dense model takes 10 ms"),
        ("--max-ms 10 --cost-table COSTS", "asks for nothing"),
        ("--speedup 9.9 --cost-table COSTS", "ask for at most 4."),
        ("--max-ms 1.1 --cost-table COSTS", "ask for at least 2."),
        ("--speedup 1.5 --cost-table NOWHERE", "tools/benchmark.py op --model NAME"),
        ("--speedup 1.5 --cost-table COSTS --img-size 64", "tools/benchmark.py op --model NAME"),
    ],
)
def test_refusals(refuse, job, costs, tmp_path, flags, said):
    words = [str(costs) if word == "COSTS" else word for word in flags.split()]
    assert said in refuse(compress, *job, *words)
    assert not (tmp_path / "out").exists()


def test_the_largest_speedup_that_is_named_can_be_had(succeed, refuse, job, costs):
    flags = [*job, "--method", "wanda", "--cost-table", costs]
    most = refuse(compress, *flags, "--speedup", "9").split("at most ")[1].split(" ")[0]
    assert succeed(compress, *flags, "--speedup", most)["predicted_speedup"] >= float(most)


# ---- tables


@pytest.mark.slow
def test_without_a_table_one_is_measured_and_kept(small_cache, refuse, job, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = refuse(compress, *job, "--max-ms", "1e9")
    (file,) = (tmp_path / "cache" / "vitoats").iterdir()
    shapes = [shape for shape in SHAPES for _ in range(3)]
    CostTable.of_model(json.loads(file.read_text())["values"], shapes)
    assert refuse(compress, *job, "--max-ms", "1e9") == first  # with the same measured time in it
    file.write_text("{}")
    refuse(compress, *job, "--max-ms", "1e9", warnings=True)
    CostTable.of_model(json.loads(file.read_text())["values"], shapes)


def test_damaged_measurements_give_the_same_model(succeed, job, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [*job, "--method", "oats-h", "--iterations", "3", "--overwrite"]
    succeed(compress, *flags)
    before = weights(tmp_path / "out")
    (file,) = (tmp_path / "cache" / "vitoats").iterdir()
    content = json.loads(file.read_text())
    content["values"][0]["errors"] = [0.0] * 4
    for damaged in (json.dumps(content), "[]", json.dumps(content["values"])):
        file.write_text(damaged)
        succeed(compress, *flags)
        now = weights(tmp_path / "out")
        assert all(torch.equal(value, before[name]) for name, value in now.items())


def test_measurements_that_cannot_be_kept_go_on_from_their_parts(succeed, call, job, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    flags = [*job, "--method", "oats-h", "--iterations", "3", "--overwrite"]

    def full(*_):
        raise RunError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_values", full)
        succeed(compress, *flags)
    assert [path.name.endswith(".unfinished.json") for path in (tmp_path / "cache" / "vitoats").iterdir()] == [True]
    before = weights(tmp_path / "out")
    status, _, err = call(compress, *flags)
    assert status == 0
    assert "going on with an interrupted measurement: 12 parts" in err
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "out").items())
    assert [path.name.endswith(".unfinished.json") for path in (tmp_path / "cache" / "vitoats").iterdir()] == [False]


def test_other_images_are_measured_anew(succeed, job, tmp_path, monkeypatch):
    """Even those of the same names in the same folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(16):
        write_image(tmp_path / "images" / f"{i}.png", i)
    flags = [*job, "--data-dir", tmp_path / "images", "--method", "oats-h", "--iterations", "3", "--overwrite"]
    succeed(compress, *flags)
    for i in range(16):
        write_image(tmp_path / "images" / f"{i}.png", 100 + i)
    succeed(compress, *flags)
    assert len(list((tmp_path / "cache" / "vitoats").iterdir())) == 2
