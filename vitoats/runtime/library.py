"""The native library libvitoats_ops: its path, its registration with ONNX Runtime, and its instruction sets."""

import ctypes
import functools
import os
import sys
import time
from pathlib import Path

import onnxruntime as ort

from vitoats.common.errors import InputError

LIBRARY = "libvitoats_ops.dll" if sys.platform == "win32" else "libvitoats_ops.so"
ISA_VARIABLE = "VITOATS_ISA"  # forces the kernels of one instruction set, for tests and comparisons


def library_path() -> Path | None:
    """The library's file, for any ONNX Runtime API that takes a path; None if the package was installed without it."""
    import vitoats.runtime  # in an editable install the library is in another folder than this file

    return next((path for folder in vitoats.runtime.__path__ if (path := Path(folder) / LIBRARY).is_file()), None)


def register(options: ort.SessionOptions) -> bool:
    """Registers the native operator with session options that do not have it yet.

    Returns:
        whether the library is installed, and so was registered.

    Raises:
        InputError: the environment variable VITOATS_ISA is not an instruction set of this processor.
    """
    if _library() is None:
        return False
    if not isa():
        raise InputError(
            f"{ISA_VARIABLE}={os.environ[ISA_VARIABLE]} names no instruction set of this processor: "
            f"unset it, or set it to one of {', '.join(available_isas())}"
        )
    options.register_custom_ops_library(str(library_path()))
    return True


def isa() -> str:
    """The instruction set of the kernels in new sessions: avx512, avx2, neon or portable; "" if VITOATS_ISA is invalid.

    Raises:
        InputError: the native library is not installed.
    """
    return _loaded().vitoats_isa().decode()


def available_isas() -> list[str]:
    """All instruction sets that this processor supports, best first.

    Raises:
        InputError: the native library is not installed.
    """
    library = _loaded()
    names: list[str] = []
    while (name := library.vitoats_available_isa(len(names))) is not None:
        names.append(name.decode())
    return names


def fma_peak_gflops(seconds: float = 0.5) -> float:
    """The peak of one core in 10^9 floating-point operations per second: fused multiply-adds on registers only.

    Args:
        seconds: how long to measure; the best of many short runs counts.

    Raises:
        InputError: the native library is not installed.
    """
    library, best, end = _loaded(), 0.0, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        operations = library.vitoats_fma(1_000_000)
        best = max(best, operations / (time.perf_counter() - start) / 1e9)
    return best


class Watch:
    """A context that records which linear layers of this thread's new sessions get native kernels; ``nodes`` has the names."""

    def __enter__(self) -> "Watch":
        self.nodes: list[str] = []
        if (library := _library()) is not None:
            library.vitoats_watch_nodes()
        return self

    def __exit__(self, *_) -> None:
        if (library := _library()) is not None:
            size = library.vitoats_watched_nodes(None, 0)
            buffer = ctypes.create_string_buffer(size)
            library.vitoats_watched_nodes(buffer, size)
            self.nodes = buffer.raw.decode().splitlines()


@functools.cache
def _library() -> ctypes.CDLL | None:
    path = library_path()
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.vitoats_isa.restype = ctypes.c_char_p
    library.vitoats_available_isa.argtypes, library.vitoats_available_isa.restype = [ctypes.c_int], ctypes.c_char_p
    library.vitoats_fma.argtypes, library.vitoats_fma.restype = [ctypes.c_int64], ctypes.c_double
    library.vitoats_watch_nodes.restype = None
    library.vitoats_watched_nodes.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.vitoats_watched_nodes.restype = ctypes.c_size_t
    return library


def _loaded() -> ctypes.CDLL:
    if (library := _library()) is None:
        raise InputError("there is no native library: install vitoats with a C++17 compiler at hand")
    return library
