"""vitoats: sparse + low-rank compression of vision transformers, and their export for CPUs.

The package is lazy: ``import vitoats`` costs nothing, and ``vitoats.runtime`` needs neither torch nor timm.
"""

__version__ = "0.1.0"

_LAZY = {
    "compress": "vitoats.compression.pipeline",
    "prune": "vitoats.compression.structural",
    "load": "vitoats.loading.load",
    "load_model": "vitoats.loading.load",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitoats' has no attribute {name!r}")
