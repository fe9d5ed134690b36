"""A deployer's install has numpy and onnxruntime only: vitoats and vitoats.runtime import with everything else blocked."""

import subprocess
import sys
from pathlib import Path

BLOCKED = ("torch", "torchvision", "timm", "onnx", "onnxscript", "safetensors", "PIL", "yaml", "rich", "huggingface_hub")


def test_runtime_needs_no_torch():
    code = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None
import vitoats, vitoats.runtime, vitoats.runtime.decoder, vitoats.runtime.tokens
print(vitoats.__version__, callable(vitoats.runtime.session))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("True\n")


def test_importing_the_package_loads_nothing():
    code = "import sys, vitoats; print(sorted(n for n in sys.modules if n.split('.')[0] in ('torch', 'timm', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert done.stdout == "[]\n", done.stderr
