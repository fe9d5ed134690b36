"""Signals, an old ONNX Runtime and the whole demo, as real processes on a real file system."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.conftest import heed_ctrl_c, write_image
from vitoats.common.manifest import read_manifest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def start(*argv: str, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
        **kwargs,
    )


def compress_flags(output: Path) -> list[str]:
    flags = "--model dinov2s_derived --preset fast --nsamples 64 --batch-size 16 --iterations 5 --threads 1"
    return ["tools/compress.py", *flags.split(), "--output", str(output)]


def blocks_done(output: Path) -> int:
    return len(list(output.with_name(output.name + ".partial").glob("block_*.safetensors")))


def test_an_interrupted_run_leaves_no_output_and_resumes(tmp_path):
    """One run of ten blocks, stopped by four signals, each after one more block."""
    output, resume = tmp_path / "out", []
    for sent, status in [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 130), (signal.SIGKILL, -9)]:
        done = blocks_done(output)
        process = start(*compress_flags(output), *resume)
        deadline = time.monotonic() + 300
        while blocks_done(output) == done:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == status, stderr
        assert not output.exists()
        assert stdout == ""
        if status == 130:
            assert stderr.splitlines()[-1] == "error: interrupted"
            assert ("repeat the command" if resume else "add --resume") in stderr
        resume = ["--resume"]
    refused = start(*compress_flags(output))
    assert "--resume" in refused.communicate(timeout=300)[1]
    assert refused.returncode == 2
    resumed = start(*compress_flags(output), *resume)
    stdout, stderr = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, stderr
    assert "resuming" in stderr
    assert json.loads(stdout.splitlines()[-1])["n_layers"] == 40
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB, too small for the hidden states."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_no_room_for_hidden_states_is_one_line_and_nothing_half_written(small_disk):
    flags = [*compress_flags(small_disk / "out"), "--nsamples", "512", "--target", "block"]  # which keeps nothing else
    stdout, _ = start(*flags, "--dry-run").communicate(timeout=300)
    between = json.loads(stdout.splitlines()[-1])["memory_gb"] - 0.015  # what it takes with them in memory, and without
    process = start(*flags, "--memory-limit", str(between))
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 1, stderr
    assert stdout == ""
    assert "space" in stderr.splitlines()[-1].lower()
    assert not (small_disk / "out").exists()
    assert not list(small_disk.glob("**/*.writing*"))


def test_demo(tmp_path):
    """The main job: its JSON line, and about the accuracy that docs/results.md states."""
    process = start("tools/demo.py", "--threads", "1", "--output", str(tmp_path / "demo"))  # other tests have the other core
    stdout, stderr = process.communicate(timeout=2700)
    assert process.returncode == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    keys = "model method compression top1_dense top1 n_images onnx_mb_dense onnx_mb latency_ms_dense latency_ms"
    assert list(result)[:10] == keys.split()
    assert result["native_nodes"] == 40
    assert (result["model"], result["method"], result["n_images"]) == ("dinov2s_derived", "oats-h", 2000)
    assert result["compression"] == pytest.approx(0.5, abs=0.002)
    assert [row["method"] for row in result["rows"]] == ["dense", "int8", "oats", "oats-h", "oats-h-int8"]
    dense, int8, oats, oats_h, oats_h_int8 = result["rows"]
    assert oats_h.items() <= (result | {"img_size": 98}).items()
    assert result["top1_dense"] > 86
    assert oats["top1"] > 65  # its path depends on the last bits: 71.35 to 79.75 so far
    assert result["top1"] > result["top1_dense"] - 2
    assert oats_h_int8["top1"] > result["top1"] - 1
    assert result["onnx_mb"] < 0.58 * result["onnx_mb_dense"]
    assert oats_h_int8["onnx_mb"] < 0.2 * dense["onnx_mb"] < int8["onnx_mb"]
    manifest = read_manifest(tmp_path / "demo")
    assert manifest.command == "demo"
    assert {"oats-h.onnx", "oats-h/model.safetensors"} <= manifest.outputs.keys()
    # the same folder in torch gives the same answers as its ONNX file
    flags, n_correct = "--num-samples 200 --threads 1 --quiet", []
    for model in ("oats-h", "oats-h.onnx"):
        process = start("tools/eval_imagenet.py", "--model", str(tmp_path / "demo" / model), *flags.split())
        stdout, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr
        n_correct.append(json.loads(stdout)["n_correct1"])
    assert n_correct[0] == pytest.approx(n_correct[1], abs=1)


def test_onnx_runtime_1_17_runs_the_file(tmp_path):
    """The oldest ONNX Runtime that docs/deploy.md names, in a venv of its own: the same outputs as the newest."""
    model, venv = tmp_path / "model.onnx", tmp_path / "venv"
    flags = f"--random-weights --img-size 32 --method oats --iterations 5 --threads 1 --output {tmp_path / 'out'}"
    images = tmp_path / "images"
    for i in range(16):
        write_image(images / f"{i}.png", i)
    name = "--model vit_tiny_patch16_224 --data-dir"
    for command in (
        ["tools/compress.py", *name.split(), str(images), *flags.split()],
        ["tools/export_onnx.py", str(tmp_path / "out"), "-o", str(model)],
    ):
        process = start(*command)
        stderr = process.communicate(timeout=300)[1]
        assert process.returncode == 0, stderr
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    old = ["onnxruntime==1.17.3", "numpy<2"]
    subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *old], check=True)
    code = f"""
import numpy, onnxruntime
session = onnxruntime.InferenceSession({str(model)!r}, providers=["CPUExecutionProvider"])
images = numpy.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(numpy.float32)
numpy.save({str(tmp_path)!r} + f"/{{onnxruntime.__version__}}.npy", session.run(None, {{"images": images}})[0])
"""
    for python in (sys.executable, str(venv / "bin" / "python")):
        subprocess.run([python, "-c", code], check=True)
    newest, oldest = (np.load(p) for p in (tmp_path / f"{onnxruntime.__version__}.npy", tmp_path / "1.17.3.npy"))
    assert np.abs(newest - oldest).max() < 1e-5 * np.abs(newest).max()
