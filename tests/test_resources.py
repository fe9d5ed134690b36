"""What a long-lived process holds after many compressions and sessions, and how many threads work: each in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.data.transforms import Preprocessing
from vitoats.export.onnx_file import export_onnx
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.runtime import library

import torch  # isort: skip

ROOT = Path(__file__).parent.parent
MB = 10**6
BUSY = 0.1  # share of the busiest thread's processor time from which a thread is one that works
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
native = pytest.mark.skipif(library.library_path() is None, reason="vitoats was installed without its native library")

SESSIONS = """
import numpy as np
from vitoats.runtime.inference import session

def work():
    opened = session({file!r}, threads=2)
    opened.run(None, {{"images": np.ones((1, 3, 32, 32), np.float32)}})
"""
COMPRESSIONS = """
import torch
from tests.conftest import make_tiny
from vitoats import api

def work():
    images = torch.ones(8, 3, 32, 32) * torch.arange(8).view(8, 1, 1, 1)
    api.compress(make_tiny(1), images, method={method!r}, compression=0.5, **{settings!r})
"""
GROWTH = """
import json
from vitoats.common.memory import resident_memory

sizes = []
for i in range({times}):
    work()
    sizes.append(resident_memory())
print(json.dumps(sizes))
"""
INFERENCES = """
import sys, time
import numpy as np
from vitoats.runtime.inference import session

file, threads = sys.argv[1:]
opened = session(file, threads=int(threads))
images = np.ones((256, 3, 32, 32), np.float32)  # so much that a second thread that is woken late still finds work

def work():
    end = time.process_time() + 2
    while time.process_time() < end:
        opened.run(None, {"images": images})
"""
COMPRESSION = """
import sys
from vitoats.cli import compress

def work():
    compress.main(sys.argv[1:])
"""
WORKING = """
import json
from pathlib import Path

def ticks():
    stats = {t.name: (t / "stat").read_text().rsplit(")", 1)[1].split() for t in Path("/proc/self/task").iterdir()}
    return {thread: int(stat[11]) + int(stat[12]) for thread, stat in stats.items()}

before = ticks()
work()
print(json.dumps([time - before.get(thread, 0) for thread, time in ticks().items()]))
"""


def run(program: str, *argv: str) -> list[int]:
    """The last line that a program prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def working(program: str, *argv: str) -> int:
    """The number of threads that a program's `work` keeps busy; those that end before it does are not seen."""
    ticks = run(program + WORKING, *argv)
    return sum(n >= BUSY * max(ticks) for n in ticks)


@pytest.fixture(scope="module", params=["float", "int8"])
def file(request, tmp_path_factory) -> str:
    model = make_tiny(2)
    report = compress_in_place(
        model, torch.randn(4, 3, 32, 32), job_of("oats", OATSConfig(iterations=2), int8=request.param == "int8")
    )
    path = tmp_path_factory.mktemp("files") / "small.onnx"
    assert report.compression > 0
    export_onnx(LoadedModel("tiny", model, Preprocessing(32), "random weights"), path)
    return str(path)


@linux
@native
def test_five_hundred_sessions_leave_nothing(file):
    sizes = run(SESSIONS.format(file=file) + GROWTH.format(times=500))
    assert sizes[-1] - sizes[99] < 4 * MB  # 10 kB each


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), [("oats-h", {"iterations": 3}), ("numerical", {})])
def test_fifty_compressions_leave_nothing(method, settings):
    sizes = run(COMPRESSIONS.format(method=method, settings=settings) + GROWTH.format(times=50))
    assert sizes[-1] - sizes[9] < 20 * MB


@linux
@native
@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_works_with_as_many_threads_as_asked(file, threads):
    assert working(INFERENCES, file, str(threads)) == threads


@linux
@pytest.mark.parametrize("threads", [1, 2])
def test_a_compression_works_with_at_most_as_many_threads_as_asked(threads, tmp_path):
    flags = (
        "--model vit_tiny_patch16_224 --random-weights --data-dir sample --img-size 112 --method oats --iterations 2 --quiet"
    )
    more = ["--nsamples", "64", "--threads", str(threads), "--output", str(tmp_path / "out")]
    assert 1 <= working(COMPRESSION, *flags.split(), *more) <= threads
