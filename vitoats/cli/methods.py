"""Lists the compression methods: their settings with defaults, and the statistics they need.

    vitoats methods
    vitoats methods oats-h

compress --method takes these names, and --method-options the settings.
"""

import sys
from dataclasses import asdict
from typing import Any

from vitoats.cli import config_file, flags
from vitoats.common.errors import InputError

NEEDS = {
    "diagonal": "mean square of each input",
    "full": "full second moment of the inputs",
    "neurons": "mean square of each input and of the neurons",
}


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, prints the list; returns the JSON line.

    Raises:
        InputError: there is no method of that name.
    """
    parser = flags.parser("methods", __doc__)
    parser.add_argument("names", nargs="*", metavar="METHOD", help="only these; all by default")
    args = config_file.parse(parser, argv)

    import vitoats.methods  # noqa: F401  (fills the tables)
    from vitoats.methods.registry import METHODS, STRUCTURAL

    known = METHODS | STRUCTURAL
    if unknown := [name for name in args.names if name not in known]:
        raise InputError(f"unknown method {unknown[0]!r}: use one of {', '.join(sorted(known))}")
    found = {name: _described(known[name], name in STRUCTURAL) for name in args.names or sorted(known)}
    if not args.quiet:
        for name, about in found.items():
            print(f"{name}: {about['summary']}")
            print(f"    needs: {about['needs']}")
            print(f"    settings: {_listed(about['settings'])}")
            print(f"    recipe: {_listed(about['recipe'])}")
    return {"methods": found}


def _described(method: Any, structural: bool) -> dict[str, Any]:
    """A method's summary (the first paragraph of its module), needed statistics, settings and recipe."""
    summary = " ".join((sys.modules[method.config.__module__].__doc__ or "").split("\n\n")[0].split())
    needs = "scores heads and neurons by the second moments of their outputs" if structural else NEEDS[method.needs]
    return {
        "summary": summary,
        "needs": needs,
        "settings": asdict(method.config()),
        "recipe": asdict(method.recipe),
    }


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
