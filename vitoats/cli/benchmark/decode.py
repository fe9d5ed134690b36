"""Times language models on the CPU with one text at a time: the prompt, then token by token.

    python tools/benchmark.py decode --model smollm2 --keep files/smollm2
    python tools/benchmark.py decode --model generated --keep files/1b --rounds 2 --steps 16

All variants take turns in one run. --keep makes the files in a folder, where the next run finds them; with --make-only the run
ends there. generated is a Llama with random weights, of 1.1 billion parameters unless the size flags say otherwise, so that its
weights exceed the last-level cache. Zeros and low-rank terms of the compressed variants are random, too. The variants:

    dense                    float32, in ONNX Runtime
    ort-int8, ort-4bit       ONNX Runtime's MatMulNBits, by the model builder
    ort-dynamic-int8         ONNX Runtime's dynamic quantization, per channel; for models below 2 GB
    llama-q8_0               llama.cpp's 8 bits (pip install 'vitoats[llama-cpp]')
    native-int8              the dense model in int8 with our operators, the head included
    sl-50, -float16, -int8   S + U V with half of the weights removed; the head is float32, but int8 in -int8
    sl-40, unstructured-40   40 % removed: S + U V, and zeros alone
"""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags
from vitoats.common.amx import refuse_amx
from vitoats.common.errors import InputError
from vitoats.common.machine import last_level_cache, processor

if TYPE_CHECKING:
    from vitoats.loading.loaded_text import LoadedLanguageModel

GENERATED = "generated"
THREADS = (1, 2)
RECORD = "benchmark.json"  # says which model the files in a kept folder are of


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    args = config_file.parse(_parser(), argv)
    if args.no_amx:
        refuse_amx()
    if args.make_only and args.keep is None:
        raise InputError("--make-only leaves files in --keep: name that folder")

    from vitoats.benchmark.decode import compare_decoders
    from vitoats.benchmark.decode_files import NAMES, make_variants
    from vitoats.runtime import library

    for name in args.variant or []:
        if name not in NAMES:
            raise InputError(f"there is no variant {name}: give --variant one of {', '.join(NAMES)}")
    with _files(args.keep) as folder:
        _check_record(folder, args)
        names = tuple(args.variant or NAMES)
        variants = make_variants(lambda: _load(args), folder, names, args.rank_ratio, args.seed)
        machine = {"processor": processor(), "isa": library.isa() if library.library_path() else None}
        result = {"model": args.model, **machine, "cache_mb": round(last_level_cache() / 1e6, 1), "variants": list(variants)}
        if args.make_only:
            return result
        rows = compare_decoders(
            variants,
            args.threads or THREADS,
            args.prefill,
            args.steps,
            args.rounds,
            args.seed,
            lambda done, total, what: common.log.info("%d/%d %s", done + 1, total, what),
        )
    if not args.quiet:
        _print(f"{args.model}, {processor()}; prompt of {args.prefill} tokens, then {args.steps}", rows)
    return result | {"prefill": args.prefill, "steps": args.steps, "rows": [dataclasses.asdict(row) for row in rows]}


def _parser() -> argparse.ArgumentParser:
    from vitoats.benchmark.generated_model import LlamaSize

    parser = flags.parser("benchmark decode", __doc__)
    parser.add_argument("--model", default="smollm2", metavar="NAME", help="as for compress, or generated")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the files there, and use those that are there")
    parser.add_argument("--make-only", action="store_true", help="make the files, and time nothing")
    parser.add_argument("--variant", metavar="NAME", action="append", help="only this beside dense; all by default")
    parser.add_argument("--threads", type=flags.positive, action="append", metavar="X", help="CPU threads; 1 and 2")
    parser.add_argument("--prefill", type=flags.positive, default=512, metavar="N", help="tokens of the prompt")
    parser.add_argument("--steps", type=flags.positive, default=64, metavar="N", help="tokens after it")
    parser.add_argument("--rounds", type=flags.positive, default=3, metavar="N", help="turns of each variant")
    parser.add_argument("--rank-ratio", type=float, default=0.25, metavar="KAPPA", help="share of the kept for low rank")
    parser.add_argument("--seed", type=flags.seed, default=0, help="of weights, zeros and tokens")
    sizes = parser.add_argument_group("size of the generated model")
    for field in dataclasses.fields(LlamaSize):
        flag = f"--{field.name.replace('_', '-')}"
        sizes.add_argument(flag, type=flags.positive, default=field.default, metavar="N")
    flags.add_no_amx(parser)
    return parser


def _load(args: argparse.Namespace) -> "LoadedLanguageModel":
    from vitoats.benchmark.generated_model import LlamaSize, generated_model
    from vitoats.loading.language_models import load_language_model

    if args.model != GENERATED:
        return load_language_model(args.model)
    return generated_model(
        LlamaSize(**{field.name: getattr(args, field.name) for field in dataclasses.fields(LlamaSize)}), args.seed
    )


@contextlib.contextmanager
def _files(keep: Path | None) -> Iterator[Path]:
    """The folder of the files, which is removed afterwards unless it is to be kept."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="vitoats-benchmark-") as scratch:
        yield Path(scratch)


def _check_record(folder: Path, args: argparse.Namespace) -> None:
    """Notes which model the files of a folder are of; refuses a folder with those of another."""
    from vitoats.benchmark.generated_model import LlamaSize
    from vitoats.common.json_files import read_json, to_json

    record = {"model": args.model, "rank_ratio": args.rank_ratio, "seed": args.seed}
    if args.model == GENERATED:
        record |= {field.name: getattr(args, field.name) for field in dataclasses.fields(LlamaSize)}
    path = folder / RECORD
    if path.is_file() and read_json(path) != record:
        raise InputError(f"{folder} has files of another model or other settings ({RECORD}): give another --keep")
    path.write_text(to_json(record, indent=1))


def _print(title: str, rows: Any) -> None:
    from vitoats.report.tables import print_table

    print_table(
        title,
        ("threads", "variant", "prefill t/s", "decode t/s", "ms/token", "speedup", "over ort-int8", "MB"),
        [
            (
                f"{row.threads}",
                row.variant,
                f"{row.prefill_tokens_per_second:.0f}",
                f"{row.decode_tokens_per_second:.1f}",
                f"{row.decode_ms:.2f}",
                f"{row.speedup:.2f}x",
                "" if row.speedup_int8 is None else f"{row.speedup_int8:.2f}x",
                f"{row.file_mb:.0f}",
            )
            for row in rows
        ],
    )
