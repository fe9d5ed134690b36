"""Writes a Llama with random weights in bfloat16, one block a file, to try large models.

    python tools/make_language_model.py --blocks 28 --width 3072 --inner 8192 --heads 24 --groups 8 --output llama-3b

Only one block at a time is in memory. The tokenizer knows the bytes of UTF-8, a token each.
"""

import argparse
import json
from pathlib import Path

import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before transformers, which imports torchvision)

from safetensors.torch import save_file  # isort: skip
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"blocks": 28, "width": 3072, "inner": 8192, "heads": 24, "groups": 8, "vocabulary": 128256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        num_key_value_heads=args.groups,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    args.output.mkdir(parents=True)
    config.save_pretrained(args.output)
    ByT5Tokenizer().save_pretrained(args.output)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if name.startswith("model.layers.") else "other"
        files.setdefault(f"model-{block}.safetensors", []).append(name)
    for file, names in files.items():
        save_file({name: random(shapes[name]) for name in names}, args.output / file, {"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (args.output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    print(f"{sum(shape.numel() for shape in shapes.values()) / 1e9:.2f} G parameters in {args.output}")


def random(shape: torch.Size) -> torch.Tensor:
    """Random weights whose outputs are about as large as their inputs."""
    return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else (torch.randn(shape) / shape[1] ** 0.5).bfloat16()


if __name__ == "__main__":
    main()
