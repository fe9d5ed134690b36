"""Models that are larger than the memory they may take, measured from outside: a compression is a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (the extra lm)")
ROOT = Path(__file__).parent.parent.parent
SIZES = {"blocks": 14, "width": 1024, "inner": 2816, "heads": 16, "groups": 4, "vocabulary": 16000}
SETTINGS = {"data-dir": "sample", "seq-len": 64, "nsamples": 8, "method": "oats", "iterations": 2, "threads": 1}


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def tool(name: str, *argv: str) -> str:
    done = subprocess.run([sys.executable, f"tools/{name}.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def most_resident(*command: str) -> tuple[int, str]:
    """The most bytes that a process had resident, and its output."""
    watch = (
        "import resource, subprocess, sys; output = subprocess.run(sys.argv[1:], capture_output=True, text=True, check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); print(output.stdout)"
    )
    done = subprocess.run([sys.executable, "-c", watch, *command], cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    return int(first) * 1024, rest


@pytest.mark.slow
def test_a_model_takes_the_memory_of_a_few_blocks(tmp_path):
    tool("make_language_model", *flags(SIZES), "--output", str(tmp_path / "dense"))
    weights = sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))
    asked = ["--model", f"local-dir:{tmp_path / 'dense'}", *flags(SETTINGS), "--output", str(tmp_path / "out"), "--quiet"]
    expected = json.loads(tool("compress", *asked, "--dry-run").splitlines()[-1])["memory_gb"] * 1e9
    peak, output = most_resident(sys.executable, "tools/compress.py", *asked)
    assert peak < 1.3 * expected  # pages of the mapped files are resident, too, and are not estimated
    assert peak < 500e6 + 2 * weights  # less than the process and the model in float32
    said = json.loads(output.strip().splitlines()[-1])
    assert said["compression"] == pytest.approx(0.5, abs=0.01)
    assert said["model_mb"] < 0.75 * weights / 1e6
