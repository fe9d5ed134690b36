"""Runs the model builder of ONNX Runtime GenAI, which writes a decoder as ONNX with a key-value cache, in a process of its own.

    python -m vitoats.export.genai_builder -m FOLDER -i FOLDER -o OUTPUT -p fp32 -e cpu

The builder changes the import path and prints; this module is the program of that process. It takes the builder's own flags.
"""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vitoats.common.errors import InputError, RunError

PACKAGE = "onnxruntime_genai"
# classes of transformers whose graphs were compared with torch; the builder takes more
ARCHITECTURES = (
    *("Gemma2ForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
)
OPTIONS = ("fuse_qkv=false", "windowed_kv_cache=false")  # a product for each of q, k and v; caches of full length
HEAD_WIDTHS = 16  # of which the width of a head is a multiple, for ONNX Runtime's attention
Precision = Literal["fp32", "int8", "int4"]


def check_buildable(model: Any) -> None:
    """Refuses, before any work, a transformers model of which the builder would make no graph, or a wrong one.

    Raises:
        InputError: such a model, with the reason; or the builder is not installed.
    """
    kind, config = type(model).__name__, model.config
    if kind not in ARCHITECTURES:
        names = ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
        raise InputError(f"{kind} has no ONNX export: use a model of one of the families {names}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width % HEAD_WIDTHS:
        raise InputError(f"the heads of {kind} are {width} wide, and ONNX Runtime's attention takes multiples of {HEAD_WIDTHS}")
    window = getattr(config, "sliding_window", None)
    if kind == "MistralForCausalLM" and window is not None and window < config.max_position_embeddings:
        raise InputError(f"the ONNX export of {kind} knows no `sliding_window` of {window} tokens: set it to null")
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.out_features == config.vocab_size:
            raise InputError(f"{name} has as many outputs as there are tokens, so that the builder takes it for the head")
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError("the ONNX export of language models needs onnxruntime-genai: pip install 'vitoats[genai]'")


def build(model: Path, output: Path, precision: Precision = "fp32") -> None:
    """Writes a transformers folder as ONNX; nothing is fetched.

    Args:
        model: the folder, with its tokenizer.
        output: the folder to write, which gets model.onnx, model.onnx.data, genai_config.json and tokenizer files.
        precision: of the weights; "int8" and "int4" are ONNX Runtime's MatMulNBits.

    Raises:
        RunError: the builder failed, with its last line.
    """
    folders = ["-m", str(model), "-i", str(model), "-o", str(output), "-c", str(output / "cache")]
    argv = [sys.executable, "-m", __name__, *folders, "-p", precision, "-e", "cpu", "--extra_options", *OPTIONS]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0 or not (output / "model.onnx").is_file():
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise RunError(f"the model builder of ONNX Runtime GenAI failed ({last[0][:200]}): try another version of it")


if __name__ == "__main__":
    import vitoats.common.torchvision_ops  # noqa: F401  (before transformers, which imports torchvision)

    runpy.run_module(f"{PACKAGE}.models.builder", run_name="__main__", alter_sys=True)
