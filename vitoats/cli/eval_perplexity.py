"""Measures the perplexity of a language model on text.

    python tools/eval_perplexity.py --model smollm2 --data-dir text.txt
    python tools/eval_perplexity.py --model runs/smollm2 --data-dir text.txt --against smollm2

--model takes smollm2, hf-hub:owner/name, local-dir:/path, or a folder that compress or export_onnx wrote; --against one with
the same tokens.
"""

from argparse import Namespace
from typing import Any

from vitoats.cli import common, config_file, flags, record
from vitoats.common.errors import InputError


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    return record.recorded("eval_perplexity", config_file.parse(make_parser(), argv), argv, execute)


def execute(args: Namespace) -> dict[str, Any]:
    """Measures; returns the JSON line."""
    from vitoats.common.devices import check_device, set_threads
    from vitoats.common.unfinished import Unfinished
    from vitoats.evaluation.language_target import LanguageTarget, language_target
    from vitoats.evaluation.perplexity import (
        Perplexity,
        measure_perplexity,
        read_test_text,
        rounded_error,
        unfinished_perplexity,
    )
    from vitoats.loading.language_models import is_language_model
    from vitoats.runtime.decoder import is_decoder

    if args.against is not None and not (is_decoder(args.against) or is_language_model(args.against, look_at_hub=True)):
        raise InputError(f"there is no language model {args.against}: give --against another, or leave it out")
    set_threads(args.threads)
    device = check_device(args.device)
    target = language_target(args.model, args.context, device, args.threads)
    context = target.seq_len
    stride = args.stride or max(1, context // 2)
    text = read_test_text(args.data_dir, target.need_tokenizer(), target.vocab_size, args.max_tokens)

    def measure(of: LanguageTarget, title: str) -> Perplexity:
        unfinished.append(unfinished_perplexity(of.digest(), text, context, stride, args.batch_size))
        with common.Bar(title, args.quiet) as bar:
            update, kept = bar.update, unfinished[-1]
            return measure_perplexity(of.logits_of, of.vocab_size, text, context, stride, args.batch_size, update, kept)

    unfinished: list[Unfinished] = []
    found = measure(target, "perplexity")
    result = {"model": args.model, "data_dir": args.data_dir, "context": context, "stride": stride, **found.to_dict()}
    if args.against is not None:
        dense = measure(language_target(args.against, context, device, args.threads), args.against)
        difference, error = found.against(dense)
        result |= {
            "against": args.against,
            "against_perplexity": round(dense.per_token, 4),
            "log_difference": round(difference, 6),
            "log_difference_se": rounded_error(error, 6),
        }
    for each in unfinished:
        each.remove()
    if not args.quiet:
        spread = "(a single window)" if found.standard_error is None else f"+- {found.standard_error:.3f}"
        print(f"perplexity {found.per_token:.3f} {spread} per token, {found.per_word:.2f} per word")
    return result


def make_parser() -> flags.ArgumentParser:
    """The flags of eval_perplexity."""
    parser = flags.parser("eval_perplexity", __doc__)
    parser.add_argument("--model", "-m", required=True, metavar="NAME", help="smollm2, hf-hub:, local-dir: or a folder")
    parser.add_argument(
        "--data-dir", required=True, metavar="FILE", help="a .txt, .jsonl or .parquet file, a folder, or 'sample'"
    )
    parser.add_argument("--against", metavar="NAME", help="also measure this model, window by window, such as the dense one")
    parser.add_argument(
        "--context", type=flags.positive, metavar="N", help="tokens of a window (default: 2048 or the positions)"
    )
    parser.add_argument("--stride", type=flags.positive, metavar="N", help="tokens by which it moves (default: half of it)")
    parser.add_argument("--max-tokens", type=flags.positive, metavar="N", help="measure on the first N tokens")
    parser.add_argument("-b", "--batch-size", type=flags.positive, default=4, metavar="N", help="windows at a time")
    flags.add_compute_flags(parser, seed_of="changes nothing: nothing here is drawn at random")
    return parser
