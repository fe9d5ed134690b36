"""Proves the contract of the commands: exit status, one JSON line at the end, one line for an error, as real processes too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vitoats
from tests.jobs import weights, without
from vitoats.cli.benchmark import main as benchmark
from vitoats.cli.compress import main as compress
from vitoats.cli.demo import main as demo
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.cli.main import COMMANDS, dispatch
from vitoats.cli.results import write_results
from vitoats.cli.train_linear_probe import main as train_linear_probe
from vitoats.common.errors import RunError

ROOT = Path(__file__).parent.parent.parent
FILES = ["README.md", "config.json", "model.safetensors", "run.json", "run.log", "vitoats.json"]


# ---- what success looks like


def test_the_default_method_is_oats_h(succeed, job, tmp_path):
    result = succeed(compress, *without(job, "--method"))
    assert (result["method"], result["rank_ratio"], result["pattern"]) == ("oats-h", 0.25, "layer")
    said = json.loads((tmp_path / "out/vitoats.json").read_text())
    assert said["recipe"]["allocation"] == "sensitivity"
    assert set(said["calibration"]["images"]) == {"own", "synthetic"}


def test_a_preset_sets_what_is_not_given(succeed, refuse, job, tmp_path):
    job = without(job, "--method", "--iterations", "--nsamples")
    succeed(compress, *job, "--preset", "fast")
    said = json.loads((tmp_path / "out/vitoats.json").read_text())
    assert (said["config"]["solver"], said["config"]["iterations"], said["recipe"]["allocation"]) == ("support", 20, "uniform")
    assert (said["calibration"]["nsamples"], said["recipe"]["target"]) == (128, "residual")
    succeed(compress, *job, "--preset", "fast", "--iterations", "3", "--nsamples", "16", "--overwrite")
    said = json.loads((tmp_path / "out/vitoats.json").read_text())
    assert (said["config"]["iterations"], said["calibration"]["nsamples"]) == (3, 16)
    assert "--preset" in refuse(compress, *job, "--preset", "fast", "--method", "wanda", "--overwrite")


@pytest.mark.parametrize("quiet", [True, False])
def test_compress_ends_with_one_json_line(call, job, tmp_path, quiet):
    status, out, err = call(compress, *job, "--results-file", tmp_path / "r.json", *["--quiet"] * quiet)
    assert status == 0
    lines = out.splitlines()
    assert (tmp_path / "r.json").read_text() == lines[-1] + "\n"
    result = json.loads(lines[-1])
    assert result["n_layers"] == 12
    assert result["n_images"] == 16
    assert result["output"] == str(tmp_path / "out")
    assert result["model_mb"] == round((tmp_path / "out/model.safetensors").stat().st_size / 1e6, 3)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.json"]  # no scratch left
    if quiet:
        assert (len(lines), err) == (1, "")
    else:
        assert sum("blocks." in line for line in lines) == 12  # the table of layers
        assert "patch_embed.proj" in out  # and what stays dense


def test_compression_in_the_json_line_is_that_of_the_weights(succeed, job, tmp_path):
    result = succeed(compress, *job, "--compression", "0.6", "--rank-ratio", "0.3")
    about = json.loads((tmp_path / "out/vitoats.json").read_text())
    total = kept = 0
    for name, tensor in weights(tmp_path / "out").items():
        if ".S." in name or ".U." in name or ".V." in name:
            kept += tensor.numel() if not name.endswith(".mask") else 0
    for layer in about["layers"]:
        total += layer["d_out"] * layer["d_in"]
    assert result["compression"] == pytest.approx(1 - kept / total, abs=1e-6)
    assert result["compression"] == pytest.approx(0.6, abs=0.03)


def test_all_commands_give_what_the_results_file_holds(call, plain, job, image_tree, tmp_path):
    runs = [
        (eval_imagenet, "--model", plain, "--data-dir", image_tree),
        (export_onnx, plain, "-o", tmp_path / "m.onnx"),
        (eval_imagenet, "--model", tmp_path / "m.onnx", "--data-dir", image_tree),
        (benchmark, "solver", *job[:2], "--iterations", "2", "--threads", "1"),
    ]
    for i, (main, *argv) in enumerate(runs):
        status, out, err = call(main, *argv, f"--results-file={tmp_path / f'{i}.json'}")
        assert status == 0, err
        assert (tmp_path / f"{i}.json").read_text() == out.splitlines()[-1] + "\n"
        assert json.loads(out.splitlines()[-1])["model"]


def test_a_results_file_that_cannot_be_written_is_refused_before_the_work(refuse, job, tmp_path):
    (tmp_path / "file").touch()
    for file in (tmp_path / "file" / "results.json", tmp_path):
        assert "--results-file" in refuse(compress, *job, "--results-file", file)
    assert not (tmp_path / "out").exists()


def test_a_result_that_cannot_be_written_in_the_end_is_printed(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="--results-file"):
        write_results(tmp_path / "file" / "results.json", None, {"n": 1}, '{"n": 1}')
    assert capsys.readouterr().out == '{"n": 1}\n'


def test_help_groups_flags_and_says_no_empty_defaults(capsys):
    with pytest.raises(SystemExit):
        compress(["--help"])
    said = capsys.readouterr().out
    groups = ("model:", "images:", "resources:", "method:", "amount:", "recipe:")
    assert [group for group in groups if f"\n{group}" not in said] == []
    assert not [words for words in ("default: None", "default: False", "default: )", "default: ==") if words in said]
    assert "images at a time (default: 64; 4 windows of text)" in " ".join(said.split())


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        compress(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"vitoats {vitoats.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "vitoats", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vitoats {vitoats.__version__}\n"


# ---- the other commands


@pytest.mark.parametrize(
    ("main", "argv", "said"),
    [
        (export_onnx, [], "--output"),
        (export_onnx, ["-o", "m.onnx"], "--model"),
        (export_onnx, ["a", "--model", "b", "-o", "m.onnx"], "one model"),
        (export_onnx, ["runs/none", "-o", "m.onnx"], "no model folder runs/none"),
        (export_onnx, ["x", "-o", "m.bin"], ".onnx"),
        (export_onnx, ["x", "-o", "m.onnx", "--inline", "--dense"], "--dense"),
        (export_onnx, ["x", "-o", "m.onnx", "--float16", "--dense"], "--float16"),
        (export_onnx, ["x", "-o", "m.onnx", "--data-dir", "y"], "--verify"),
        (export_onnx, ["x", "-o", "m.onnx", "--int8", "--float16"], "--float16"),
        (export_onnx, ["x", "-o", "m.onnx", "--int8", "--matmul"], "--matmul"),
        (export_onnx, ["x", "-o", "m.onnx", "--int8", "--dense"], "--dense"),
        (eval_imagenet, [], "--model"),
        (eval_imagenet, ["--model", "vit_tiny_patch16_225", "--data-dir", "x"], "vit_tiny_patch16_224"),
        (eval_imagenet, ["--model", "x", "--num-samples", "0"], "--num-samples"),
        (eval_imagenet, ["--model", "none.onnx", "--data-dir", "x"], "none.onnx"),
        (train_linear_probe, ["--model", "x", "--output", "h.safetensors"], "--data-dir"),
        (train_linear_probe, ["--model", "x", "--data-dir", "y"], "--output"),
        (benchmark, ["solver"], "--model"),
        (benchmark, ["solver", "--model", "vit_tiny_patch16_225"], "vit_tiny_patch16_224"),
        (demo, ["--threads", "x"], "--threads"),
        (dispatch, [], "compress"),
        (dispatch, ["compres"], "compress"),
        (dispatch, ["compress"], "--model"),
        (dispatch, ["eval-imagenet"], "--model"),
    ],
)
def test_bad_usage_of_every_command(refuse, tmp_path, monkeypatch, main, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refuse(main, *argv)
    assert list(tmp_path.iterdir()) == []


def test_demo_refuses_a_folder_in_use(refuse, tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    line = refuse(demo, "--output", tmp_path)
    assert str(tmp_path) in line
    assert "--overwrite" not in line  # demo has no such flag


def test_an_onnx_file_that_exists_is_kept(succeed, refuse, plain, tmp_path):
    (tmp_path / "m.onnx").write_text("mine")
    assert "--overwrite" in refuse(export_onnx, plain, "-o", tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"
    result = succeed(export_onnx, plain, "-o", tmp_path / "m.onnx", "--overwrite")
    assert result["sparse_nodes"] == 12
    assert (tmp_path / "m.onnx").stat().st_size > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.run.json", "m.onnx.run.log"]


@pytest.mark.parametrize("flags", [[], ["--float16"], ["--inline"]])
def test_verify_compares_with_torch(succeed, plain, image_tree, tmp_path, flags):
    result = succeed(export_onnx, plain, "-o", tmp_path / "m.onnx", "--verify", "--data-dir", image_tree, *flags)
    assert 0 < result["relative_error"] < (1e-2 if flags == ["--float16"] else 1e-5)
    assert result["native_nodes"] == result["sparse_nodes"]
    assert result["n_images"] > 0
    assert all(image["margin"] <= 2 * result["logit_error"] for image in result["differing"])


def test_int8_weights_of_a_folder_and_of_a_dense_model(succeed, plain, tiny_folder, image_tree, tmp_path):
    for name, source in {"sparse": [plain], "dense": ["--model", f"local-dir:{tiny_folder}"]}.items():
        file = tmp_path / f"{name}.onnx"
        result = succeed(export_onnx, *source, "-o", file, "--int8", "--verify", "--data-dir", image_tree)
        assert (result["int8"], result["float16"], result["sparse_nodes"]) == (
            True,
            False,
            11,
        )  # 3 a block and 2
        assert result["relative_error"] < 0.05


def test_a_folder_with_int8_weights_keeps_them(succeed, refuse, job, image_tree, tmp_path):
    folder = tmp_path / "out"
    succeed(compress, *job, "--weights", "int8")
    result = succeed(export_onnx, folder, "-o", tmp_path / "m.onnx", "--verify", "--data-dir", image_tree)
    assert (result["int8"], result["sparse_nodes"]) == (True, 10)
    assert result["relative_error"] < 0.05
    for flag in ("--float16", "--matmul"):
        assert flag in refuse(export_onnx, folder, "-o", tmp_path / "other.onnx", flag)
    result = succeed(export_onnx, folder, "-o", tmp_path / "dense.onnx", "--dense")
    assert (result["int8"], result["sparse_nodes"]) == (False, 0)


def test_an_export_that_cannot_be_written_says_so_before_the_work(call, plain, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, out, err = call(export_onnx, plain, "-o", tmp_path / "file" / "m.onnx", "--quiet")
    assert status in (1, 2)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "--output" in err


# ---- as real processes


def tool(name, *argv, **env):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, argv)],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_tool_starts_and_helps(name):
    done = tool(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert name in done.stdout
    refused = tool(name, "--nonsense")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1


def test_a_whole_run_as_users_start_it(job, tmp_path):
    done = tool("compress", *job, "--quiet", "--results-file", tmp_path / "r.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (tmp_path / "r.json").read_text()


@pytest.mark.parametrize("reach", ["nothing answers", "a proxy that is not there"])
def test_weights_that_cannot_be_fetched_fail_fast_in_one_line(job, tmp_path, reach):
    dead = "http://127.0.0.1:9"
    env = {
        "nothing answers": {"HF_ENDPOINT": dead},
        "a proxy that is not there": {"https_proxy": dead, "http_proxy": dead, "all_proxy": dead},
    }[reach]
    done = tool("compress", *job, "--model", "dinov2_vits14", "--quiet", HF_HOME=str(tmp_path / "hf"), **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    for part in ("dinov2_vits14_pretrain.pth", "--checkpoint", "local-dir:"):
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_old_pickle_is_refused_in_one_line(job, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0dtouch pwned; x\x85R.")
    done = tool("compress", *job, "--model", "dinov2_vits14", "--checkpoint", tmp_path / "w.pth", "--quiet")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert not (ROOT / "pwned").exists()


def test_a_pipe_that_closes_early_is_no_traceback(job):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "tools/compress.py", *job, "--quiet"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    err = process.communicate(timeout=120)[1]
    assert "Traceback" not in err
    assert "Exception ignored" not in err
