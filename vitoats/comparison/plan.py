"""Which runs a comparison makes: methods x patterns x compressions, each as the flags of compress."""

import dataclasses
import re
from argparse import ArgumentTypeError, Namespace
from dataclasses import dataclass
from typing import Any

from vitoats.cli import compress as compress_command
from vitoats.cli.method_flags import make_config
from vitoats.common.errors import InputError

OWN = "own"  # in --patterns: each method's own default
SET_HERE = ("method", "method_options", "compression", "pattern", "config", "output", "overwrite", "resume", "format")


@dataclass(frozen=True)
class Run:
    """One run of one method.

    Attributes:
        label: what the method is called in the tables.
        pattern: as asked for, "own" for the method's own.
        target: the compression that was asked for, None where an N:M pattern sets it.
        args: the flags of compress.
        settings: all that its result depends on and that other runs do not share.
    """

    label: str
    pattern: str
    target: float | None
    args: Namespace
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """For files."""
        pattern = self.pattern.replace(":", "of")
        parts = [self.label, pattern] if self.target is None else [self.label, pattern, f"{self.target:g}"]
        return re.sub(r"[^\w.+-]", "_", "-".join(parts))

    def __str__(self) -> str:
        pattern = "" if self.pattern == OWN else f" {self.pattern}"
        return f"{self.label}{pattern}" + ("" if self.target is None else f" at {self.target:g}")


def plan(args: Namespace) -> tuple[list[Run], list[str]]:
    """All runs in the order of the flags, and a line for each pattern that a method does not take.

    Raises:
        InputError: an unknown method, or settings that a method does not take or that cannot be.
    """
    options = _options(args)
    runs: list[Run] = []
    skipped: list[str] = []
    for label, method in args.methods.items():
        for pattern in args.patterns:
            targets = [None] if ":" in pattern else args.compressions
            for target in targets:
                run = _run(args, label, method, pattern, target, options.get(label, {}))
                if isinstance(run, Run):
                    runs.append(run)
                elif run not in skipped:
                    skipped.append(run)
    if not runs:
        raise InputError(f"nothing is left to run ({'; '.join(skipped)}): add {OWN} to --patterns")
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            raise InputError(f"two runs would be called {run.name}: name one of the methods anew (--methods NEW_NAME=METHOD)")
    return runs, skipped


def _run(args: Namespace, label: str, method: str, pattern: str, target: float | None, options: dict[str, str]) -> Run | str:
    """A run, or why there is none."""
    import vitoats.methods  # noqa: F401  (fills the table of methods)
    from vitoats.methods.registry import find_method

    found = find_method(method)
    if pattern != OWN and "pattern" not in {field.name for field in dataclasses.fields(found.config)}:
        return f"{label} is left out for the pattern {pattern}: it takes no pattern"
    flags = [f"--model={args.model}", f"--method={method}", f"--output={args.output}", *_flags(args, label, options)]
    if target is not None:
        flags.append(f"--compression={target!r}")
    if pattern != OWN:
        flags.append(f"--pattern={pattern}")
    try:
        parser = compress_command.make_parser()
        made = parser.parse_args(flags)
        for name in vars(args).keys() & {action.dest for action in parser._actions}:
            setattr(made, name, getattr(args, name))
        config = make_config(made, found)
    except InputError as error:
        where = f"{label}, pattern {pattern}" + ("" if target is None else f", compression {target:g}")
        raise InputError(f"{where}: {error} (settings of one method: --options {label}:NAME=VALUE,...)") from None
    if ":" in pattern and getattr(made, "allocation", "uniform") != "uniform":
        return f"{label} is left out for the pattern {pattern}: N:M leaves nothing to allocate"
    own = {k: v for k, v in vars(made).items() if k not in vars(args) and k not in SET_HERE}
    settings = {"method": method, "method_digest": found.digest, **own, **dataclasses.asdict(config)}
    return Run(label, pattern, target, made, settings)


def _options(args: Namespace) -> dict[str, dict[str, str]]:
    """--options LABEL:NAME=VALUE,... as names and values of each label."""
    options: dict[str, dict[str, str]] = {}
    for text in args.options or []:
        label = text.partition("=")[0].rpartition(":")[0]
        if label not in args.methods:
            raise InputError(
                f"--options {text} names no method of --methods: "
                f"write METHOD:NAME=VALUE,... with one of {', '.join(args.methods)}"
            )
        for item in text.removeprefix(label + ":").split(","):
            name, equals, value = item.partition("=")
            if not equals or not name:
                raise InputError(f"--options {text}: {item!r} is no NAME=VALUE")
            options.setdefault(label, {})[name.replace("-", "_")] = value
    return options


def _flags(args: Namespace, label: str, options: dict[str, str]) -> list[str]:
    """A method's options as flags of compress; what is no flag of its own goes into --method-options."""
    actions = {action.dest: action for action in compress_command.make_parser()._actions}
    flags, rest = [], []
    for name, value in options.items():
        action = actions.get(name)
        if name in SET_HERE or name in vars(args):
            raise InputError(f"--options {label}:{name}: this is no setting of one method: leave it out")
        if action is None:
            rest.append(f"{name}={value}")
        elif action.nargs != 0:
            flags.append(f"--{name.replace('_', '-')}={value}")
        elif value == "true":
            flags.append(f"--{name.replace('_', '-')}")
        else:
            raise InputError(f"--options {label}:{name} is true, or left out")
    return flags + ([f"--method-options={','.join(rest)}"] if rest else [])


def methods(text: str) -> dict[str, str]:
    """Reads "oats,mine=./file.py:name" as methods by label, for argparse."""
    found: dict[str, str] = {}
    for item in text.split(","):
        label, _, method = item.partition("=")
        if not label or label in ("dense", "int8"):
            raise ArgumentTypeError(f"{item!r} is no METHOD or LABEL=METHOD" + (": it is always a row" if label else ""))
        if label in found:
            raise ArgumentTypeError(f"{label!r} is named twice: write LABEL=METHOD for one of them")
        found[label] = method or label
    return found


def compressions(text: str) -> list[float]:
    """Reads "0.4,0.5", for argparse; the range is what the methods say."""
    try:
        return list(dict.fromkeys(float(item) for item in text.split(",")))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no list of numbers such as 0.4,0.5") from None


def patterns(text: str) -> list[str]:
    """Reads "own,2:4", for argparse; which there are is what the methods say."""
    return list(dict.fromkeys(text.split(",")))
