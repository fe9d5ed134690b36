"""Methods compared on a tiny language model, from the command line: rows as they are found, and going on."""

import json

import pytest

from tests.language_models import PROSE, save_folder
from vitoats.cli.compare_lm import main as compare_lm
from vitoats.cli.compress import main as compress
from vitoats.cli.eval_perplexity import main as eval_perplexity
from vitoats.common import unfinished
from vitoats.comparison import language
from vitoats.compression.resume import BlockStore


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("lm")
    save_folder(root / "model")
    for name, text in {"a": PROSE, "b": PROSE[::-1], "c": PROSE.upper()}.items():
        (root / f"{name}.txt").write_text(text)
    return root


def test_rows_are_appended_and_only_missing_ones_are_made(call, succeed, files, tmp_path):
    output = tmp_path / "table.jsonl"
    flags = [
        "--model",
        f"local-dir:{files / 'model'}",
        "--data-dir",
        files / "a.txt",
        files / "b.txt",
        "--tests",
        files / "c.txt",
    ]
    flags += ["--nsamples", 32, "--seq-len", 16, "--test-tokens", 200, "--output", output]
    status, out, err = call(compare_lm, *flags, "--methods", "wanda", "dass", "--compressions", 50)
    assert status == 0, err
    _title, *table, line = out.splitlines()
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "wanda", "dass"]
    assert json.loads(line)["rows"] == rows
    assert [row.split()[:4] for row in table] == [
        ["method", "pattern", "removed", "%"],
        ["dense", f"{rows[0]['perplexity']['c']:.2f}"],
        *([row["method"], "own", f"{100 * row['compression']:.2f}", f"{row['perplexity']['c']:.2f}"] for row in rows[1:]),
    ]
    assert all(abs(row["compression"] - 0.5) < 0.02 for row in rows[1:])
    assert rows[0]["log_difference"] == {"c": 0.0}
    output.write_text("\n".join(map(json.dumps, rows[:2])) + '\n{"method": "da')  # killed while it wrote
    succeed(compare_lm, *flags, "--methods", "wanda", "dass", "--compressions", 50, "--patterns", "own", "2:4")
    again = [json.loads(row) for row in output.read_text().splitlines()]
    assert again[:2] == rows[:2]
    assert [(row["method"], row["pattern"]) for row in again[2:]] == [("dass", "own"), ("wanda", "2:4"), ("dass", "2:4")]
    assert again[2]["perplexity"] == rows[2]["perplexity"]


def test_methods_that_remove_neurons_and_calibration_in_bfloat16(succeed, files, tmp_path):
    flags = ["--model", f"local-dir:{files / 'model'}", "--data-dir", files / "a.txt", "--tests", files / "c.txt", "--nsamples"]
    flags += [24, "--seq-len", 16, "--test-tokens", 200, "--compressions", 40, "--output", tmp_path / "table.jsonl"]
    succeed(compare_lm, *flags, "--methods", "numerical", "wanda")
    succeed(compare_lm, *flags, "--methods", "wanda", "--amp")
    rows = [json.loads(row) for row in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "numerical", "wanda", "wanda"]
    assert [row["recipe"]["amp"] for row in rows[1:]] == [False, False, True]
    assert rows[1]["parameters"] < rows[2]["parameters"] == rows[3]["parameters"]
    assert 0 < abs(rows[3]["log_difference"]["c"] - rows[2]["log_difference"]["c"]) < 0.1


def test_patterns_with_a_low_rank_term_and_without(succeed, files, tmp_path):
    flags = ["--model", f"local-dir:{files / 'model'}", "--data-dir", files / "a.txt", "--tests", files / "c.txt", "--nsamples"]
    flags += [24, "--seq-len", 16, "--test-tokens", 200, "--methods", "oats", "--iterations", 2]
    flags += ["--output", tmp_path / "table.jsonl"]
    for pattern, ratio in (("2:4", 0), ("2:8", 0.5), ("2:4", 0.25)):
        succeed(compare_lm, *flags, "--patterns", pattern, "--rank-ratio", ratio)
    rows = [json.loads(row) for row in (tmp_path / "table.jsonl").read_text().splitlines()[1:]]
    assert [row["config"]["rank_ratio"] for row in rows] == [0, 0.5, 0.25]
    assert rows[0]["compression"] == 0.5
    assert abs(rows[1]["compression"] - 0.5) < 0.05  # ranks are whole numbers
    assert abs(rows[2]["compression"] - 1 / 3) < 0.05


def test_rounded_models_beside_the_methods(succeed, files, tmp_path):
    flags = ["--model", f"local-dir:{files / 'model'}", "--data-dir", files / "a.txt", "--tests", files / "c.txt", "--nsamples"]
    flags += [24, "--seq-len", 16, "--test-tokens", 200, "--compressions", 40, 50, "--patterns", "own", "2:4"]
    succeed(compare_lm, *flags, "--methods", "int8", "4-bit", "magnitude", "--output", tmp_path / "table.jsonl")
    rows = [json.loads(row) for row in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "int8", "4-bit", "magnitude", "magnitude", "magnitude"]
    dense, int8, four, *_ = (row["perplexity"]["c"] for row in rows)
    assert 0 < abs(int8 / dense - 1) < abs(four / dense - 1)
    assert [row["compression"] for row in rows[1:3]] == [0, 0]


def test_compress_and_eval_perplexity_from_the_command_line(succeed, refuse, files, tmp_path):
    flags = ["--model", f"local-dir:{files / 'model'}", "--data-dir", files / "a.txt", files / "b.txt", "--nsamples", 32]
    flags += ["--seq-len", 16, "--compression", 0.4, "--iterations", 3, "--output", tmp_path / "out"]
    line = succeed(compress, *flags)  # OATS-H with targets and measured budgets
    about = json.loads((tmp_path / "out" / "vitoats.json").read_text())
    assert line["method"] == "oats-h"
    assert line["n_layers"] == 14
    assert about["recipe"]["allocation"] == "sensitivity"
    assert about["calibration"]["windows"].keys() == {"1:a.txt", "2:b.txt"}
    assert len({budget["compression"] for budget in about["budgets"].values()}) > 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "text-generation" in card
    assert "32 windows of 16 tokens, of a.txt, b.txt" in card
    small = succeed(eval_perplexity, "--model", tmp_path / "out", "--data-dir", files / "c.txt", "--max-tokens", 200)
    assert small["context"] == 16
    assert "`" not in refuse(compress, *flags, "--overwrite", "--img-size", 32)
    assert "--data-dir" in refuse(compress, *flags[:3], files / "none.txt", *flags[5:], "--overwrite")


def test_an_interrupted_compression_goes_on(succeed, files, tmp_path, monkeypatch):
    from vitoats.compression.resume import BlockStore

    flags = ["--model", f"local-dir:{files / 'model'}", "--data-dir", files / "a.txt", "--nsamples", 24, "--seq-len", 16]
    flags += ["--method", "oats", "--iterations", 3]
    succeed(compress, *flags, "--output", tmp_path / "whole")
    save = BlockStore.save

    def stop_after(self, index, *rest):
        save(self, index, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save", stop_after)
        with pytest.raises(KeyboardInterrupt):
            compress([str(flag) for flag in (*flags, "--output", tmp_path / "out", "--quiet")])
    assert (tmp_path / "out.partial").is_dir()
    succeed(compress, *flags, "--output", tmp_path / "out", "--resume")
    for file in ("model.safetensors", "vitoats.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def stops(monkeypatch, place, name, when, after=False):
    """Makes a function raise KeyboardInterrupt in its first call for which ``when(*its arguments)``; notes its calls."""
    real, calls, stopped = getattr(place, name), [], []

    def noted(*args, **kwargs):
        stop = not stopped and when(*args)
        if stop:
            stopped.append(args)
        if stop and not after:
            raise KeyboardInterrupt
        calls.append(args)
        found = real(*args, **kwargs)
        if stop:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(place, name, noted)
    return calls


def of_dense(kept):
    """Whether parts are those of the dense model, which are in the user's cache."""
    return not kept._path.parent.name.endswith(".partial")


def rows_of(path):
    return [{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in path.read_text().splitlines()]


def test_a_row_goes_on_at_the_block_and_the_window_where_it_stopped(call, succeed, files, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--model", f"local-dir:{files / 'model'}", "--data-dir", files / "a.txt", "--tests", files / "c.txt", "--nsamples"]
    flags += [16, "--seq-len", 16, "--test-tokens", 100, "--methods", "oats", "--iterations", 2, "--compressions", 50]
    flags += ["--batch-size", 1, "--output"]
    succeed(compare_lm, *flags, tmp_path / "whole.jsonl")

    def stopped():
        status, _, err = call(compare_lm, *flags, tmp_path / "table.jsonl")
        assert (status, err.splitlines()[-1]) == (130, "error: interrupted")

    saved = stops(monkeypatch, BlockStore, "save", lambda _store, index, *_: index == 0, after=True)
    stopped()
    assert [index for _store, index, *_ in saved] == [0]
    windows = stops(monkeypatch, unfinished.Unfinished, "add", lambda kept, _: not of_dense(kept) and len(kept.parts) == 3)
    stopped()
    assert [index for _store, index, *_ in saved] == [0, 1]
    assert [of_dense(kept) for kept, _ in windows] == [False] * 3  # those of the dense model were there
    stops(monkeypatch, language, "_append", lambda _, row: row["method"] == "oats")
    stopped()
    assert len(saved) == 2
    n = len(windows)
    assert [of_dense(kept) for kept, _ in windows] == [False] * n
    stops(monkeypatch, language, "remove_beside", lambda *_: True)
    stopped()
    assert len(windows) == n  # all were there
    assert [row["method"] for row in rows_of(tmp_path / "table.jsonl")] == ["dense", "oats"]
    assert list(tmp_path.glob("*.partial"))
    succeed(compare_lm, *flags, tmp_path / "table.jsonl")
    assert rows_of(tmp_path / "table.jsonl") == rows_of(tmp_path / "whole.jsonl")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"cache", *(f"{name}.jsonl{end}" for name in ("table", "whole") for end in ("", ".run.json", ".run.log"))}
    assert not list(tmp_path.rglob("*.unfinished*"))


def test_a_failed_row_loses_no_window_of_the_dense_model(call, succeed, files, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--model", f"local-dir:{files / 'model'}", "--data-dir", files / "a.txt", "--tests", files / "c.txt", "--nsamples"]
    flags += [16, "--seq-len", 16, "--test-tokens", 100, "--methods", "4-bit", "--output", tmp_path / "table.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(language, "round_groups", lambda x: x / 0)
        status, _, err = call(compare_lm, *flags)
        assert status == 1
        assert "failed: 4-bit own" in err.splitlines()[-1]
    assert list(tmp_path.rglob("*.unfinished*"))
    windows = stops(monkeypatch, unfinished.Unfinished, "add", lambda *_: False)
    succeed(compare_lm, *flags)
    assert [kept for kept, _ in windows if of_dense(kept)] == []
    assert not list(tmp_path.rglob("*.unfinished*"))
