"""What users get: a wheel that runs without a compiler, a source distribution, builds by other compilers."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

import vitoats
from tests.runtime.sparse_models import operator_model, random_low_rank, random_sparse

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
slow = pytest.mark.slow


def run(*argv, **kwargs) -> str:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=1500, **kwargs)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def make(target: str, folder: Path) -> str:
    """Runs a target on a copy of the sources, with this environment for its own."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "tests"))
    binaries = Path(sys.executable).parent
    return run("make", target, f"BIN={binaries}", "-o", "setup", cwd=folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    return next(folder.glob("*.tar.gz"))


@slow
@pytest.mark.xdist_group("sdist")
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_a_wheel_of_the_source_distribution_runs_without_a_compiler(sources, tmp_path):
    """In an empty environment: the doctor finds kernels, and a product is that of NumPy."""
    with tarfile.open(sources) as archive:
        archive.extractall(tmp_path / "sources", filter="data")
    (folder,) = (tmp_path / "sources").iterdir()
    run("make", "wheel", f"BIN={Path(sys.executable).parent}", "-o", "setup", cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert re.fullmatch(rf"vitoats-{re.escape(vitoats.__version__)}-py3-none-manylinux_.*\.whl", wheel.name)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "csrc" in name]
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    random = np.random.default_rng(0)
    S, low_rank = random_sparse(random, 70, 90, 0.6), random_low_rank(random, 70, 90, 2, 11)
    onnx.save(operator_model(S, low_rank=low_rank), tmp_path / "model.onnx")
    x = random.standard_normal((2, 30, 90), np.float32)
    np.save(tmp_path / "x.npy", x)
    code = """
import numpy, vitoats.runtime
opened = vitoats.runtime.session("model.onnx")
assert opened.native_nodes == ("layer",), opened.native_nodes
numpy.save("y.npy", opened.run(None, {"x": numpy.load("x.npy")})[0])
"""
    empty = {"PATH": str(tmp_path / "venv" / "bin"), "HOME": str(tmp_path)}
    run(python, "-c", code, cwd=tmp_path, env=empty)
    U, V = low_rank
    assert np.allclose(np.load(tmp_path / "y.npy"), x @ (S + (U @ V).reshape(S.shape)).T, atol=1e-3)
    assert '"isa": "' in run(tmp_path / "venv" / "bin" / "vitoats", "doctor", cwd=tmp_path, env=empty)


@slow
@pytest.mark.xdist_group("sdist")
def test_the_source_distribution_holds_the_sources_only(sources):
    with tarfile.open(sources) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "NOTICE", "pyproject.toml", "vitoats/runtime/csrc/CMakeLists.txt"} <= names
    assert not [name for name in names if name.startswith((".venv", "build/", "runs/")) or name.endswith((".so", ".onnx"))]


@slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang is not installed")
def test_the_kernels_are_right_when_built_by_clang(tmp_path):
    lines = [line for line in make("clang", tmp_path / "copy").splitlines() if "passed" in line]
    assert len(lines) == 3
    assert all(line.endswith(" 0 failed") for line in lines)


@slow
@pytest.mark.skipif(shutil.which("x86_64-w64-mingw32-g++-posix") is None, reason="MinGW is not installed")
def test_the_native_library_compiles_for_windows(tmp_path):
    make("windows", tmp_path / "copy")
    assert (tmp_path / "copy" / "build" / "windows" / "libvitoats_ops.dll").is_file()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_keep_to_their_schema(file):
    checker = Path(sys.executable).parent / "check-jsonschema"
    run(checker, "--builtin-schema", "vendor.github-workflows", file, env=os.environ)


def test_the_newest_version_of_the_changelog_is_the_packages():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] in (vitoats.__version__, "Unreleased")
