"""Proves that a comparison goes on after a stop, and tells folders apart that are not its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from tests.comparison.runs import RUNS, flags, refused
from tests.conftest import write_image
from vitoats.cli import common
from vitoats.cli.compare import main as compare
from vitoats.common.files import hold
from vitoats.comparison import compare as comparison
from vitoats.comparison import rows
from vitoats.compression.resume import BlockStore

ROOT = Path(__file__).parent.parent.parent


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_the_same_command_again_makes_nothing_anew(compared, copied, tiny_folder, data, photos, monkeypatch, capsys):
    _, before = compared
    monkeypatch.setattr(comparison, "compressed_row", lambda *_: pytest.fail("a row is made anew"))
    argv = [*flags(tiny_folder, data, copied), f"--ood-dir={photos}"]
    assert common.run(compare, argv) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (again["rows"], again["pairs"]) == (before["rows"], before["pairs"])


def test_a_stop_between_rows_loses_none(compared, begun, tiny_folder, data, photos, monkeypatch, capsys):
    argv = [*flags(tiny_folder, data, begun), f"--ood-dir={photos}"]
    real, made = comparison.compressed_row, []

    def noted(bench, run, *rest):
        made.append(run.name)
        return real(bench, run, *rest)

    def stopped(*args):
        if len(made) == 3:
            raise KeyboardInterrupt
        return noted(*args)

    monkeypatch.setattr(comparison, "compressed_row", stopped)
    assert common.run(compare, argv) == 130
    assert {p.stem for p in (begun / "rows").glob("*.json")} == {"dense", "int8", *RUNS[:3]}
    assert not (begun / "models").exists()
    monkeypatch.setattr(comparison, "compressed_row", noted)
    capsys.readouterr()
    assert common.run(compare, argv) == 0
    assert made == RUNS
    assert timeless(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == timeless(compared[1]["rows"])
    assert not (begun / "models").exists()  # nobody asked to keep them


def test_a_row_goes_on_at_the_block_where_it_stopped_and_keeps_its_blocks_until_it_is_saved(
    compared, begun, tiny_folder, data, photos, monkeypatch, capsys
):
    argv = [*flags(tiny_folder, data, begun, "wanda"), f"--ood-dir={photos}", "--patterns=own", "--compressions=0.3"]
    row, blocks, saved = begun / f"rows/{RUNS[0]}.json", begun / f"models/{RUNS[0]}.partial", []
    save = BlockStore.save

    def noted(store, index, *rest):
        save(store, index, *rest)
        saved.append(index)
        if saved == [0, 1]:
            raise KeyboardInterrupt

    def killed(*args):
        if RUNS[0] in args:
            raise KeyboardInterrupt

    monkeypatch.setattr(BlockStore, "save", noted)
    assert common.run(compare, argv) == 130
    assert len(list(blocks.glob("block_*"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(comparison.RowStore, "save", killed)
        assert common.run(compare, argv) == 130
    assert saved == [0, 1, 2]
    assert len(list(blocks.glob("block_*"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "remove_partial", killed)
        assert common.run(compare, argv) == 130
    assert row.is_file()
    assert blocks.is_dir()
    capsys.readouterr()
    assert common.run(compare, argv) == 0
    assert saved == [0, 1, 2]
    assert timeless(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == timeless(compared[1]["rows"][:3])
    assert not (begun / "models").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # what all rows share
        (["--num-samples=10"], "num_samples was 20 and is now 10"),
        (["--nsamples=8"], "nsamples was 16 and is now 8"),
        (["--seed=1"], "seed was 42 and is now 1"),
        (["--img-size=48"], "preprocessing"),
        (["--ood-dir=DATA"], "out-of-domain images"),
        # what one row has for itself
        (["--options=low:iterations=4"], "iterations was 3 and is now 4"),
        (["--options=low:rank_ratio=0.2"], "rank_ratio was 0.25 and is now 0.2"),
        (["--methods=wanda,low=wanda,svd"], "method was oats and is now wanda"),
    ],
)
def test_other_settings_are_refused_in_words(copied, tiny_folder, data, photos, capsys, change, said):
    argv = [*flags(tiny_folder, data, copied), f"--ood-dir={photos}", *(c.replace("DATA", str(data)) for c in change)]
    if "low=wanda" in change[0]:
        argv = [a for a in argv if not a.startswith("--options")]
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    assert said in refused(capsys, argv)
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_other_weights_are_refused(copied, data, photos, tiny_folder, tmp_path, capsys):
    """The same name, another model."""
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    path = tmp_path / "tiny/model.safetensors"
    state = safetensors.torch.load_file(str(path))
    state["head.bias"] += 1
    safetensors.torch.save_file(state, str(path), metadata={"format": "pt"})
    about = copied / "comparison.json"
    about.write_text(about.read_text().replace(str(tiny_folder), str(tmp_path / "tiny")))
    assert "weights (sha256)" in refused(capsys, [*flags(tmp_path / "tiny", data, copied), f"--ood-dir={photos}"])


def test_a_label_adds_a_row(copied, tiny_folder, data, photos, capsys):
    argv = [*flags(tiny_folder, data, copied, "wanda,low=oats,high=oats"), f"--ood-dir={photos}", "--patterns=own"]
    argv += ["--options=high:rank_ratio=0.5,iterations=3", "--compressions=0.5"]
    assert common.run(compare, argv) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [r["method"] for r in rows] == ["dense", "int8", "wanda", "low", "high"]
    assert rows[3]["relative_error"] != rows[4]["relative_error"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_damaged_settings_are_reported(copied, tiny_folder, data, photos, capsys, content):
    (copied / "comparison.json").write_bytes(content)
    line = refused(capsys, [*flags(tiny_folder, data, copied), f"--ood-dir={photos}"])
    assert "comparison.json" in line
    assert "delete" in line


def changed_row(path):
    row = json.loads(path.read_text())
    row["row"]["top1"] += 1
    path.write_text(json.dumps(row))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("low-2of4.json", lambda path: path.write_bytes(b"{")),
        ("low-2of4.json", lambda path: path.write_bytes(b"[" * 100_000)),
        ("low-2of4.json", lambda path: path.write_bytes(b"{}")),
        ("low-2of4.json", changed_row),
        ("low-2of4.npz", lambda path: path.write_bytes(b"PK")),
        ("low-2of4.npz", lambda path: path.unlink()),
        ("low-2of4.npz", lambda path: shutil.copy(path.with_name("low-own-0.3.npz"), path)),
        ("low-2of4.json", lambda path: shutil.copy(path.with_name("low-own-0.3.json"), path)),
    ],
)
def test_a_damaged_row_is_made_anew(compared, copied, tiny_folder, data, photos, capsys, monkeypatch, name, damage):
    damage(copied / "rows" / name)
    real, made = comparison.compressed_row, []
    monkeypatch.setattr(
        comparison, "compressed_row", lambda bench, run, *rest: made.append(run.name) or real(bench, run, *rest)
    )
    assert common.run(compare, [*flags(tiny_folder, data, copied), f"--ood-dir={photos}"]) == 0
    out, err = capsys.readouterr()
    assert made == ["low-2of4"]
    assert "made anew" in err
    assert timeless(json.loads(out.splitlines()[-1])["rows"]) == timeless(compared[1]["rows"])


def test_images_that_were_replaced_are_told(copied, tiny_folder, data, photos, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    argv = [*flags(tiny_folder, data, copied), f"--ood-dir={photos}"]
    argv[argv.index(str(data))] = str(tmp_path / "data")
    assert common.run(compare, argv) == 0  # where they lie plays no part
    write_image(tmp_path / "data/val/class1/25.png", 999)
    assert "test images" in refused(capsys, [*argv, "--num-samples=30"]) + refused(capsys, argv)
    write_image(tmp_path / "data/train/class1/01.png", 999)
    assert "calibration images" in refused(capsys, argv)


def test_two_comparisons_at_once_into_one_folder(copied, tiny_folder, data, photos, capsys):
    with hold(copied):
        code = f"""
from vitoats.cli import common
from vitoats.cli.compare import main
raise SystemExit(common.run(main, {[*flags(tiny_folder, data, copied), f"--ood-dir={photos}"]!r}))
"""
        second = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "another run is writing to" in second.stderr


def test_one_run_that_fails_does_not_stop_the_others(copied, tiny_folder, data, photos, capsys):
    """No layer here has a multiple of 5 inputs."""
    argv = [*flags(tiny_folder, data, copied, "wanda"), f"--ood-dir={photos}", "--patterns=2:5,own"]
    capsys.readouterr()
    assert common.run(compare, argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "multiple of 5" in err
    assert "failed: wanda 2:5" in err.splitlines()[-1]
    result = json.loads((copied / "results.json").read_text())
    assert [(r["method"], r["target"]) for r in result["rows"]] == [
        ("dense", None),
        ("int8", None),
        ("wanda", 0.3),
        ("wanda", 0.5),
    ]
    assert result["failed"] == ["wanda 2:5"]


def test_a_model_that_gives_no_numbers_is_no_row(begun, tiny_folder, data, photos, monkeypatch, capsys):
    real = rows.compress

    def broken(*args, **kwargs):
        compressed = real(*args, **kwargs)
        compressed.model.norm.weight.data[0] = float("nan")
        return compressed

    monkeypatch.setattr(rows, "compress", broken)
    argv = [*flags(tiny_folder, data, begun, "wanda"), f"--ood-dir={photos}", "--patterns=2:4"]
    assert "failed: wanda 2:4" in refused(capsys, argv, status=1)
    assert "NaN" not in (begun / "results.json").read_text()
