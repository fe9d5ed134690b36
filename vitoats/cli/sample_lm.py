"""Writes text that a language model samples, to calibrate on beside your own.

    python tools/sample_lm.py --model smollm2 --output sampled.jsonl
    python tools/sample_lm.py --model smollm2 --windows 64 --output sampled.jsonl
    python tools/compress.py --model smollm2 --data-dir mine.txt sampled.jsonl --compression 0.5 --output runs/smollm2

The whole model is in memory.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from vitoats.cli import common, config_file, flags, record


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, samples, writes the file; returns the JSON line."""
    return record.recorded("sample_lm", config_file.parse(make_parser(), argv), argv, execute)


def execute(args: Namespace) -> dict[str, Any]:
    """Samples, writes the file; returns the JSON line."""
    from vitoats.common.outputs import check_output_file

    check_output_file(args.output, args.overwrite)

    from vitoats.common.devices import check_device, set_threads
    from vitoats.common.files import atomic_write
    from vitoats.loading.language_models import load_language_model
    from vitoats.models.sampled_text import sampled_texts

    set_threads(args.threads)
    device = check_device(args.device)
    loaded = load_language_model(args.model, args.seq_len)
    length, tokenizer = loaded.preprocessing.seq_len, loaded.need_tokenizer()
    texts: list[str] = []
    with common.Bars(args.quiet) as progress:
        for some in sampled_texts(loaded.model.to(device), tokenizer, args.windows, length, args.seed):
            texts += some
            progress("sampling", len(texts), args.windows, "")
    with atomic_write(args.output) as aside:
        aside.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return {"model": args.model, "texts": len(texts), "tokens": len(texts) * length, "output": str(args.output)}


def make_parser() -> flags.ArgumentParser:
    """The flags of sample_lm."""
    parser = flags.parser("sample_lm", __doc__)
    parser.add_argument("--model", "-m", required=True, metavar="NAME", help="smollm2, hf-hub: or local-dir:, or a folder")
    parser.add_argument(
        "--windows", "-n", type=flags.positive, default=64, metavar="N", help="texts, each of a window's length"
    )
    parser.add_argument("--seq-len", type=flags.positive, default=1024, metavar="N", help="tokens of a window")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    flags.add_compute_flags(parser, "of the draws")
    return parser
