"""vitoats: sparse + low-rank compression of vision transformers, and their export for CPUs.

Imports are lazy: ``import vitoats`` costs nothing, and ``vitoats.runtime`` needs neither torch nor timm.
"""

__version__ = "0.1.0"

_LAZY = {
    "compress": "vitoats.api",
    "load": "vitoats.loading.load",
    "export_onnx": "vitoats.api",
    "evaluate": "vitoats.api",
    "InputError": "vitoats.common.errors",
    "RunError": "vitoats.common.errors",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitoats' has no attribute {name!r}")
