"""vitoats doctor: what it says of this machine, of a bad VITOATS_ISA, and of an installation without its native library."""

import numpy as np
import pytest

from vitoats.benchmark import self_check
from vitoats.cli import doctor
from vitoats.common.errors import InputError, RunError
from vitoats.runtime import instruction_sets
from vitoats.runtime.library import available_isas, isa

native = pytest.mark.skipif(doctor.library_path() is None, reason="installed without the native library")


@native
def test_every_kernel_that_runs_is_right_and_the_others_have_a_reason():
    found = doctor.main([])
    assert found["isa"] == isa()
    assert [name for name, kernel in found["kernels"].items() if kernel["runs"]] == available_isas()
    for kernel in found["kernels"].values():
        assert kernel["runs"] == (kernel["reason"] == "") == (kernel["errors"] is not None)
        assert not kernel["runs"] or kernel["errors"]["float32"] < 1e-5
    assert found["versions"]["numpy"] == np.__version__


@native
def test_a_wrong_result_is_an_error_that_names_the_kernel(monkeypatch):
    monkeypatch.setattr(self_check, "exact", lambda x, W: 1.01 * (x[0, 0] @ W.T))
    with pytest.raises(RunError, match=rf"wrong results by {available_isas()[0]} \(float32\)"):
        doctor.main([])


@native
def test_a_kernel_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("VITOATS_ISA", "sse2")
    with pytest.raises(InputError, match=r"VITOATS_ISA=sse2 does not run here: unset it, or set it to one of .*portable"):
        doctor.main([])


@native
def test_a_reason_tells_a_lesser_processor_from_a_system_that_refuses(monkeypatch, tmp_path):
    lesser, refused = tmp_path / "lesser", tmp_path / "refused"
    lesser.write_text("processor : 0\nflags : fma avx2\nflags : of another processor\n")
    refused.write_text(f"flags : {' '.join(instruction_sets.NEEDED['x86_64']['amx'])}\n")
    monkeypatch.setattr(instruction_sets, "available_isas", lambda: ["portable"])
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: "x86_64")
    reasons = {}
    for path in (lesser, refused, tmp_path / "none"):
        monkeypatch.setattr(instruction_sets, "CPUINFO", path)
        reasons[path] = instruction_sets.instruction_sets()
    assert reasons[lesser]["avx2"] == "the processor lacks f16c, bmi1, bmi2, popcnt"
    assert reasons[refused]["amx"] == "the processor has it, but the system refuses it"
    assert reasons[tmp_path / "none"]["amx"] == "the system does not say what the processor has"
    assert reasons[lesser]["portable"] == ""


def test_a_missing_library_and_what_to_do(monkeypatch, caplog):
    monkeypatch.setattr(doctor, "library_path", lambda: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    with caplog.at_level("WARNING", "vitoats"):
        found = doctor.main([])
    assert found["isa"] is None
    assert "install a C++17 compiler" in caplog.text
