"""Adds evaluation results to the model card (README.md) of a folder that compress wrote.

    python tools/eval_imagenet.py --model runs/vitb14 --data-dir imagenet/val --results-file results.json
    python tools/model_card.py runs/vitb14 --evaluation results.json
    python tools/model_card.py runs/vitb14 --evaluation dense.json results.json

compress writes the card without evaluations; this command rewrites it with them. Each row names the evaluated model.
"""

from pathlib import Path
from typing import Any

from vitoats.cli import config_file, flags
from vitoats.cli.results import read_results
from vitoats.common.errors import InputError
from vitoats.common.files import atomic_write

NEEDED = {"model", "top1", "top5", "n_images"}


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, writes the card; returns the JSON line."""
    parser = flags.parser("model_card", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that compress wrote")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", required=True, metavar="FILE", help="what eval_imagenet wrote with --results-file"
    )
    args = config_file.parse(parser, argv)

    from vitoats.loading.checkpoint import CARD, about, is_checkpoint
    from vitoats.loading.model_card import model_card
    from vitoats.loading.timm_config import read_config

    if not is_checkpoint(args.folder):
        raise InputError(f"{args.folder} was not written by compress (it has no vitoats.json): name a folder that was")
    evaluations = []
    for file in args.evaluation:
        if not file.is_file():
            raise InputError(f"there is no results file {file}: give --evaluation what eval_imagenet wrote with --results-file")
        found = read_results(file)
        if not found or not all(isinstance(line, dict) and line.keys() >= NEEDED for line in found):
            raise InputError(f"{file} holds no result of eval_imagenet: give --evaluation what it wrote with --results-file")
        evaluations += found
    license = read_config(args.folder).pretrained_cfg.get("license")
    card = model_card(about(args.folder), license, evaluations)
    with atomic_write(args.folder / CARD, "free some space, or copy the folder") as partial:
        partial.write_text(card)
    return {"output": str(args.folder / CARD), "evaluations": len(evaluations)}
