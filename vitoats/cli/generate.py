"""Continues a text with a language model in ONNX, on the CPU.

    python tools/export_onnx.py runs/smollm2 -o smollm2-onnx
    python tools/generate.py --model smollm2-onnx --prompt "The sea is"
    python tools/generate.py --model smollm2-onnx --prompt "The sea is" --max-new-tokens 64

The most probable token is taken each time, or one is drawn with --temperature. torch is not needed.
"""

import time
from pathlib import Path
from typing import Any

from vitoats.cli import config_file, flags


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, generates; returns the JSON line."""
    args = config_file.parse(make_parser(), argv)

    from vitoats.runtime.decoder import Decoder
    from vitoats.runtime.sampling import top_p_sampler
    from vitoats.runtime.tokens import read_tokenizer

    sampler = top_p_sampler(args.temperature, args.top_p, args.seed)
    decoder = Decoder(args.model, args.threads)
    tokenizer = read_tokenizer(decoder.folder)
    prompt = tokenizer.encode(args.prompt).ids
    start = time.perf_counter()
    tokens, times = [], []
    for token in decoder.generate(prompt, args.max_new_tokens, sampler):
        tokens.append(token)
        times.append(time.perf_counter() - start)
    text = tokenizer.decode(tokens)
    if not args.quiet:
        print(args.prompt + text)
    return {
        "model": str(args.model),
        "prompt": args.prompt,
        "text": text,
        "prompt_tokens": len(prompt),
        "new_tokens": len(tokens),
        "native_nodes": len(decoder.session.native_nodes),
        "prefill_tokens_per_second": round(len(prompt) / times[0], 1),
        "decode_tokens_per_second": round((len(tokens) - 1) / (times[-1] - times[0]), 1) if len(tokens) > 1 else None,
    }


def make_parser() -> flags.ArgumentParser:
    """The flags of generate."""
    parser = flags.parser("generate", __doc__)
    parser.add_argument("--model", "-m", type=Path, required=True, metavar="DIR", help="a folder that export_onnx wrote")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=flags.positive, default=64, metavar="N", help="the most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most probable token")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most probable tokens of this total probability",
    )
    parser.add_argument("--seed", type=flags.seed, default=0, help="of the draws")
    parser.add_argument("--threads", type=flags.non_negative, default=0, metavar="N", help="CPU threads; 0 takes all cores")
    return parser
