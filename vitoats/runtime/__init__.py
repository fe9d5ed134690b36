"""Running exported files on a CPU, with the native operator: numpy and onnxruntime only, never torch."""

from vitoats.runtime.inference import Session, metadata, session
from vitoats.runtime.library import available_isas, isa, library_path, register

__all__ = ["Session", "available_isas", "isa", "library_path", "metadata", "register", "session"]
