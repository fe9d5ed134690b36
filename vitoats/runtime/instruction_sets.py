"""Which instruction sets the native library has kernels for, and why one of them does not run here."""

import platform
from pathlib import Path

from vitoats.runtime.library import available_isas

CPUINFO = Path("/proc/cpuinfo")

_AVX2 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512_VNNI = (*_AVX512, "avx512_vnni", "avx512vbmi", "avx512_vbmi2")
NEEDED = {  # the flags that a kernel needs, as Linux names them in /proc/cpuinfo; best first
    "x86_64": {
        "amx": (*_AVX512_VNNI, "amx_tile", "amx_int8", "amx_bf16"),
        "avx512_vnni": _AVX512_VNNI,
        "avx512": _AVX512,
        "avx_vnni": (*_AVX2, "avx_vnni"),
        "avx2": _AVX2,
    },
    "aarch64": {"neon_i8mm": ("asimddp", "i8mm"), "neon_dotprod": ("asimddp",), "neon": ("asimd",)},
}


def cpu_flags() -> set[str]:
    """The instruction sets of the first processor, as Linux names them; empty on other systems."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


def instruction_sets() -> dict[str, str]:
    """The kernels for this kind of processor, best first, each with why it does not run here: "" if it does.

    Raises:
        InputError: the native library is not installed.
    """
    available, flags = available_isas(), cpu_flags()
    needed: dict[str, tuple[str, ...]] = {**NEEDED.get(platform.machine(), {}), "portable": ()}
    return {name: "" if name in available else _reason(needed[name], flags) for name in needed}


def _reason(needed: tuple[str, ...], flags: set[str]) -> str:
    if not flags:
        return "the system does not say what the processor has"
    missing = [flag for flag in needed if flag not in flags]
    return f"the processor lacks {', '.join(missing)}" if missing else "the processor has it, but the system refuses it"
