"""AMX is refused to a process and to those that it starts."""

import platform
import subprocess
import sys

import pytest

from vitoats.common import amx
from vitoats.runtime import library

ISAS = "from vitoats.runtime import library; print(*library.available_isas())"
REFUSED = f"""
import subprocess, sys
from vitoats.common.amx import refuse_amx
refuse_amx()
{ISAS}
sys.stdout.flush()
subprocess.run([sys.executable, "-c", {ISAS!r}])
"""
IN_USE = f"""
from vitoats.common.amx import refuse_amx
{ISAS}
refuse_amx()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_refused_amx_is_gone_here_and_in_processes_that_are_started():
    found = run(REFUSED)
    assert found.returncode == 0, found.stderr
    others = " ".join(isa for isa in library.available_isas() if isa != "amx")
    assert found.stdout.splitlines() == [others, others]


@pytest.mark.skipif("amx" not in library.available_isas(), reason="this processor has no AMX")
def test_amx_in_use_is_one_clear_error():
    assert "AMX is in use in this process already" in run(IN_USE).stderr


@pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"), reason="AMX is refused on x86-64 Linux only"
)
@pytest.mark.parametrize("kind", ["model", "files", "op", "profile"])
def test_benchmarks_refuse_amx_before_a_library_asks_for_it(kind):
    """ONNX Runtime asks when it is imported, which no command may do before it has read its flags."""
    code = f"""
import ctypes, importlib
importlib.import_module("vitoats.cli.benchmark.{kind}")
granted = ctypes.c_uint64()
ctypes.CDLL(None).syscall({amx.ARCH_PRCTL}, {amx.ARCH_GET_XCOMP_PERM}, ctypes.byref(granted))
print(granted.value >> {amx.TILE_DATA} & 1)
"""
    assert run(code).stdout.split() == ["0"]
