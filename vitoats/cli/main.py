"""The console command ``vitoats``, with the same commands as the scripts in tools/."""

import importlib
import sys

from vitoats import __version__
from vitoats.cli import common
from vitoats.common.errors import InputError

COMMANDS = {
    "compress": "compress a vision transformer or a language model",
    "eval_imagenet": "top-1 and top-5 of a model, a compressed folder or an ONNX file",
    "eval_perplexity": "perplexity of a language model, a compressed folder or its ONNX export",
    "export_onnx": "export to ONNX",
    "generate": "continue a text with a language model in ONNX",
    "sample_lm": "text that a language model samples, to calibrate on",
    "model_card": "put evaluation results into a compressed folder's model card",
    "push": "upload a compressed folder to the Hugging Face Hub",
    "benchmark": "measure side by side",
    "compare": "methods on the same images: accuracy, fidelity, size",
    "compare_lm": "methods on a language model: perplexity",
    "report": "one HTML page about compressed models and their measurements",
    "front": "accuracy against milliseconds and bytes of exported files",
    "repeat": "do a recorded run again, and compare the results",
    "train_linear_probe": "train a linear head on frozen features",
    "demo": "the main job on embedded weights and images",
    "methods": "the methods, their settings and defaults",
    "models": "names of models",
    "doctor": "which kernels run here and why others do not, versions, what is missing",
}


def usage() -> str:
    """The usage message, with one line per command."""
    lines = [f"  {name:20}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: vitoats COMMAND [--help], or vitoats --version", *lines])


def dispatch(argv: list[str]) -> dict:
    """Runs the command named by the first argument."""
    name = argv[0].replace("-", "_") if argv else ""
    if name not in COMMANDS:
        raise InputError(f"name a command: {', '.join(COMMANDS)}")
    return importlib.import_module(f"vitoats.cli.{name}").main(argv[1:])


def main() -> int:
    """Entry point of the console command."""
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(usage())
        return 0
    if sys.argv[1:] == ["--version"]:
        print(f"vitoats {__version__}")
        return 0
    return common.run(dispatch)
