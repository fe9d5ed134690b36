"""Lists models by name: those that vitoats names itself, and timm's of a family.

    vitoats models
    vitoats models 'vit_base*'

Any model of a supported structure works, whatever its name (docs/models.md); compress says what does not fit.
"""

from typing import Any

from vitoats.cli import config_file, flags
from vitoats.common.errors import InputError


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, prints the list; returns the JSON line.

    Raises:
        InputError: no model fits the pattern.
    """
    parser = flags.parser("models", __doc__)
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="timm names that fit, with * and ?")
    args = config_file.parse(parser, argv)

    import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
    from vitoats.loading.names import EMBEDDED, HUB_NAMES

    import timm  # isort: skip

    found = {EMBEDDED: "embedded weights, DINOv2-S-derived; nothing is fetched"}
    found |= {name: f"timm's {model.timm_name}" for name, model in HUB_NAMES.items()}
    if args.pattern is not None:
        found = dict.fromkeys(timm.list_models(args.pattern, pretrained=True), "timm")
        if not found:
            raise InputError(
                f"no model of timm fits {args.pattern!r}: try '*{args.pattern.strip('*?')}*', or vitoats models '*dinov2*'"
            )
    if not args.quiet:
        for name, what in found.items():
            print(f"{name:45} {what}")
        if args.pattern is None:
            print("and timm's: vitoats models 'vit_*' lists those that fit a pattern")
    return {"models": list(found)}
