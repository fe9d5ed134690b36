"""What folders and files of results hold, whatever a stranger wrote into them."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitoats.cli.report import main as report
from vitoats.common.errors import InputError
from vitoats.report.page.fronts import lower_edge
from vitoats.report.page.headline import headline, missing
from vitoats.report.page.sources import Layer, Sources, read_sources, results_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["method", "top1", "ms", "bytes", "perplexity", "rows", "weights", "compression", "file_mb", "threads", "file"]
)


def changed(plain, folder, change):
    """A copy of a run with another vitoats.json."""
    shutil.copytree(plain, folder)
    about = json.loads((folder / "vitoats.json").read_text())
    change(about)
    (folder / "vitoats.json").write_text(json.dumps(about))
    return folder


def test_a_run_gives_its_layers(plain):
    (run,) = read_sources([plain]).runs
    about = json.loads((plain / "vitoats.json").read_text())
    assert [layer.name for layer in run.layers] == [row["name"] for row in about["layers"]]
    for layer, row in zip(run.layers, about["layers"], strict=True):
        assert layer.removed == pytest.approx(1 - row["kept_parameters"] / row["d_out"] / row["d_in"])
        assert (layer.error, layer.rank) == (row["relative_error"], sum(row["ranks"]))


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("blocks.3.attn.qkv", "blocks.3", "attn.qkv"),
        ("layers.1.blocks.0.mlp.fc1", "layers.1.blocks.0", "mlp.fc1"),
        ("model.layers.11.self_attn.q_proj", "model.layers.11", "self_attn.q_proj"),
        ("head", "", "head"),
    ],
)
def test_a_layer_knows_its_block(name, block, kind):
    layer = Layer(name, 0.5, None, 1, 1)
    assert (layer.block, layer.kind) == (block, kind)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("layers"),
        lambda about: about["layers"][0].pop("ranks"),
        lambda about: about["layers"][0].update(d_out=0),
        lambda about: about["layers"][0].update(kept_parameters="many"),
        lambda about: about["layers"].append(7),
        lambda about: about.update(layers={"a": 1}),
        lambda about: about.update(config=[1]),
        lambda about: about.update(feature_error="none"),
        lambda about: about.pop("row_blocks"),
        lambda about: about.update(format_version=99),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(refuse, plain, tmp_path, change):
    folder = changed(plain, tmp_path / "run", change)
    assert str(folder) in refuse(report, folder, "-o", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_what_is_no_run_is_refused_in_one_line(refuse, plain, tiny_folder, tmp_path):
    page = tmp_path / "page.html"
    assert "is no run" in refuse(report, tiny_folder, "-o", page)  # a dense model
    assert "no file of results" in refuse(report, tmp_path / "nothing", "-o", page)
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert "holds no results" in refuse(report, tmp_path / "a.json", "-o", page)
    (tmp_path / "a.json").write_text('{"top1": ')
    assert "is damaged" in refuse(report, tmp_path / "a.json", "-o", page)
    assert "there is no compressed layer" in refuse(report, plain, "--layers", "head", "-o", page)
    assert "add that" in refuse(report, plain, "--checkpoint", "w.pth", "-o", page)


def test_a_page_that_cannot_be_written_is_refused_first(refuse, plain, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refuse(report, plain, "-o", tmp_path / "file" / "page.html")
    assert "--overwrite" in refuse(report, plain, "-o", tmp_path / "file")
    assert "is a folder" in refuse(report, plain, "-o", tmp_path)


def test_results_of_all_commands_are_rows(tmp_path):
    evaluated = {"model": "runs/a", "top1": 80.0, "top5": 95.0, "n_images": 100, "file_mb": 2.5, "compression": 0.5}
    timed = {"processor": "p", "rows": [{"file": "x/dense.onnx", "ms": 3.0, "batch": 1, "threads": 2, "file_mb": 4.0}]}
    text = {"model": "smollm2", "perplexity": 12.5, "n_tokens": 1000}
    (tmp_path / "a.csv").write_text("model,top1,file_mb\nvit,75.5,3.25\n")
    found = [results_of(tmp_path / "r.json", said).rows[0] for said in (evaluated, timed, text)]
    assert (found[0].top1, found[0].bytes, found[0].role) == (80.0, 2.5e6, "compressed")
    assert (found[1].ms, found[1].bytes, found[1].file) == (3.0, 4e6, "dense.onnx")
    assert (found[2].perplexity, found[2].name) == (12.5, "smollm2")
    assert read_sources([tmp_path / "a.csv"]).results[0].rows[0].top1 == 75.5


@given(st.dictionaries(KEYS, JSON, max_size=6) | JSON)
def test_any_json_is_results_or_none(tmp_path_factory, said):
    found = results_of(tmp_path_factory.getbasetemp() / "r.json", said)
    if found:
        headline(Sources([], [found]))


def test_what_nobody_measured_is_missing_with_its_command(plain, tmp_path):
    sources = read_sources([plain])
    said = {part.what: part.command for part in missing(sources)}
    assert len(said) == 4
    assert all(command.startswith("python tools/") for command in said.values())
    row = {"top1": 1.0, "ms": 1.0, "bytes": 1}
    full = results_of(tmp_path / "r", [row | {"method": name} for name in ("dense", "int8", "oats")])
    assert missing(Sources(sources.runs, [full])) == []


def test_a_front_is_drawn_down_to_ten_points_below_the_dense_model(tmp_path):
    rows = results_of(tmp_path / "r", [{"method": "dense", "top1": 80.0}, {"method": "oats", "top1": 20.0}]).rows
    assert lower_edge(rows) == 70.0
    assert lower_edge(rows[1:]) == float("-inf")


def test_a_folder_cannot_name_the_dense_model_to_open(plain, tmp_path, succeed):
    """Only an embedded model is opened because a folder says so."""
    folder = changed(plain, tmp_path / "run", lambda about: about.update(model="/etc/passwd", weights="hf-hub:a/b"))
    succeed(report, folder, "-o", tmp_path / "page.html", "--num-images", 1)
    assert "add --dense MODEL" in (tmp_path / "page.html").read_text()


def test_an_unreadable_path_raises_an_input_error(tmp_path):
    with pytest.raises(InputError):
        read_sources([tmp_path])
