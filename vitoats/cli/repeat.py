"""Does a run again from the manifest beside its result, into a new folder or file, and compares the two.

    python tools/repeat.py runs/vitb14
    python tools/repeat.py vitb14.onnx --output again.onnx

Run it in the folder where the first command was typed, if that named files by relative paths. What the first run read must be
the same; other versions, another processor or number of threads are a warning. Manifests of strangers are safe to repeat: they
can only name commands of vitoats that write to --output.
"""

import contextlib
import importlib
import io
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitoats.cli import common, config_file, flags, record
from vitoats.common import manifest
from vitoats.common.errors import InputError
from vitoats.common.manifest import Manifest

REPEATED = (
    *("compress", "export_onnx", "compare", "compare_lm", "front", "sample_lm", "train_linear_probe"),
    *("eval_imagenet", "eval_perplexity", "demo"),
)
SUFFIX = "-repeated"


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, repeats the run, compares; returns the JSON line."""
    args = config_file.parse(make_parser(), argv)
    first = manifest.read_manifest(args.result)
    output = args.output or beside(args.result)
    if manifest.machine(0)["processes"] > 1:
        raise InputError("a run is repeated by one process: leave torchrun out")
    again = settings_of(first, output, args.allow_code)
    again.quiet = args.quiet
    import torch

    for line in other_circumstances(first, again.threads or torch.get_num_threads()):
        common.log.warning("%s", line)

    common.log.info("repeating vitoats %s into %s", first.command, output)
    command = importlib.import_module(f"vitoats.cli.{first.command}")
    typed = first.argv.index("--") if "--" in first.argv else len(first.argv)
    flag = "--output" if "output" in again else "--results-file"
    argv = [*first.argv[:typed], flag, str(output), *first.argv[typed:]]
    result = record.recorded(first.command, again, argv, command.execute, first.inputs)
    if "output" not in again:
        from vitoats.cli.results import write_results
        from vitoats.common.json_files import to_json

        write_results(output, again.results_format, result, to_json(result))

    from vitoats.comparison.repeated import differences

    found = differences(first, result, args.result, output)
    for line in found.lines():
        common.log.info("%s", line)
    return {"result": str(args.result), "command": first.command, "output": str(output), **found.to_dict()}


def beside(result: Path) -> Path:
    """The folder or file to write if none is given."""
    result = result if result.name not in ("", "..") else result.resolve()
    return result.with_name(f"{result.name}{SUFFIX}" if result.is_dir() else f"{result.stem}{SUFFIX}{result.suffix}")


def settings_of(first: Manifest, output: Path, allow_code: bool) -> Namespace:
    """The flags of the first run, parsed anew, with all that it wrote sent to ``output``.

    Raises:
        InputError: the manifest names no command to repeat, or flags that this vitoats does not take; the run executes code
            that is not vitoats', which is not allowed; or ``output`` exists.
    """
    if first.command not in REPEATED:
        raise InputError(f"the manifest names {first.command[:40]!r}, which is not repeated: run one of {', '.join(REPEATED)}")
    parser = importlib.import_module(f"vitoats.cli.{first.command}").make_parser()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args = config_file.parse(parser, first.argv)
    except SystemExit:  # --help or --version
        raise InputError("the manifest holds no run but a request for help: run the command again") from None
    except InputError as error:
        raise InputError(f"the manifest's flags are refused ({error}): run the command again") from None
    code = [file for text in texts(vars(args)) if (file := record.own_method(text))]
    if getattr(args, "dataset", ""):  # timm's readers may run what such a name holds
        code.append(args.dataset)
    if code and not allow_code:
        raise InputError(f"this run executes code of {code[0]}: look at it, then add --allow-code")
    if getattr(args, "dry_run", False):
        raise InputError("the manifest is of a dry run, which has no result: run the command again")
    if os.path.lexists(output):
        raise InputError(f"{output} exists: give --output another")
    nowhere = {"overwrite": False, "resume": False, "report": None, "cache": None, "results_file": None}
    for name, value in nowhere.items():
        if name in args:
            setattr(args, name, value)
    setattr(args, "output" if "output" in args else "results_file", output)
    return args


def texts(value: Any) -> Iterator[str]:
    """All texts in the values of flags."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Path):
        yield str(value)
    elif isinstance(value, dict):
        yield from texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts(inner)


def other_circumstances(first: Manifest, threads: int) -> list[str]:
    """What else differs from the first run than its inputs, a line each."""
    here = {
        "versions": manifest.versions(),
        "machine": manifest.machine(threads),
        "environment": manifest.environment(),
    }
    lines = []
    for kind, values in here.items():
        before = getattr(first, kind)
        changed = [name for name in {**before, **values} if before.get(name) != values.get(name)]
        lines += [
            f"{name}: {before.get(name) or 'none'} in the first run, {values.get(name) or 'none'} now" for name in changed
        ]
    return lines


def make_parser() -> flags.ArgumentParser:
    """The flags of repeat."""
    parser = flags.parser("repeat", __doc__)
    parser.add_argument("result", type=Path, metavar="DIR", help="a folder or file whose run is recorded beside it")
    parser.add_argument(
        "--output", "-o", type=Path, metavar="DIR", help=f"the folder or file to write (default: DIR{SUFFIX}, beside the first)"
    )
    parser.add_argument("--allow-code", action="store_true", help="run a method from a file, or the reader of a data set")
    return parser
