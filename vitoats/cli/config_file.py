"""Reads the values of flags from a YAML file.

ConfigArgParse, jsonargparse and tyro were tried (1.9, 4.53 and 1.0). Out of the box, the first two read an unquoted 2:4 as 124,
the last two accept a compression in the file together with the flag --speedup, and none suggests the nearest name for a typo.
Wrapping the closest, ConfigArgParse, took about as much code and as many of argparse's internals as this module.
"""

import argparse
import difflib
from pathlib import Path
from typing import Any

from vitoats.common.errors import InputError


def parse(made: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parses flags; missing ones come from ``--config FILE`` (YAML: flag names without leading dashes), then from the defaults.

    Raises:
        InputError: a flag or the file is invalid.
    """
    config = first_look(argv, complain=True).config
    if config is not None and any(action.dest == "config" for action in made._actions):
        settings = _settings(config, made)
        for action in made._actions:
            if action.required and settings.get(action.dest) is not None:
                action.required = False
        given = made.parse_args(argv)
        for group in made._mutually_exclusive_groups:
            names = [action.dest for action in group._group_actions]
            set_here = [name for name in names if name in settings]
            if len(set_here) > 1:
                raise InputError(f"{config}: {' and '.join(set_here)} exclude each other: leave one of them out")
            if any(getattr(given, name, None) not in (None, made.get_default(name)) for name in names):  # a flag overrides it
                settings = {name: value for name, value in settings.items() if name not in names}
        made.set_defaults(**settings)
    args = made.parse_args(argv)
    if config is None and getattr(args, "config", None) is not None:
        raise InputError("write --config in full: an abbreviation would not be found in time")
    return args


def first_look(argv: list[str], complain: bool) -> argparse.Namespace:
    """Parses the flags that are needed before the command's own parser exists, including those in a config file."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--quiet", action="store_true")
    first.add_argument("--results-file", type=Path)
    first.add_argument("--results-format")
    try:
        found = first.parse_known_args(argv)[0]
        values = {} if found.config is None else _read_config(found.config)
    except argparse.ArgumentError:  # the command's own parser reports it
        return argparse.Namespace(config=None, quiet="--quiet" in argv, results_file=None, results_format=None)
    except InputError:
        if complain:
            raise
        return argparse.Namespace(config=None, quiet="--quiet" in argv, results_file=None, results_format=None)
    found.quiet = found.quiet or values.get("quiet") == "true"
    if found.results_file is None and isinstance(values.get("results_file"), str):
        found.results_file = Path(values["results_file"])
    found.results_format = found.results_format or values.get("results_format")
    return found


def _read_config(path: Path) -> dict[str, Any]:
    """Reads a YAML file of settings; values stay text, so that they pass the same checks as flags."""
    from vitoats.cli.settings_yaml import load_settings

    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file that can be read twice: give --config a YAML file")
    try:
        with path.open("rb") as file:
            values = load_settings(file) or {}
    except OSError as error:
        raise InputError(f"the config file {path} cannot be read ({error.strerror}): give --config a YAML file") from None
    except ValueError as error:
        raise InputError(f"the config file {path} is not YAML of settings ({error}): correct it") from None
    if not isinstance(values, dict):
        raise InputError(f"the config file {path} holds no settings: write lines such as 'compression: 0.5'")
    return values


def _settings(path: Path, made: argparse.ArgumentParser) -> dict[str, Any]:
    """Converts the settings of a config file to values of a parser's flags; empty settings keep their defaults."""
    actions = {
        option.lstrip("-").replace("-", "_"): action
        for action in made._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("help", "config") and not _negates(action, option)
    }
    settings: dict[str, Any] = {}
    named: dict[str, str] = {}  # the file's name for each flag
    for key, text in _read_config(path).items():
        action = actions.get(key.replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(key, actions, n=1)
            hint = f", did you mean {near[0]}?" if near else f" (see {made.prog} --help)"
            raise InputError(f"{path}: unknown setting {key!r}{hint}")
        if (other := named.setdefault(action.dest, key)) != key:
            raise InputError(f"{path}: {other} and {key} are the same setting: leave one of them out")
        if text == "":
            continue
        if not isinstance(text, str):
            raise InputError(f"{path}: {key} takes one value, not a list or a mapping")
        if action.nargs == 0:
            if text.lower() not in ("true", "false"):
                raise InputError(f"{path}: {key} is true or false, not {text!r}")
            settings[action.dest] = text.lower() == "true"
            continue
        try:
            values = [made._get_value(action, part) for part in (text.split() if action.nargs == "+" else [text])]
            for value in values:
                made._check_value(action, value)
            settings[action.dest] = values if action.nargs == "+" else values[0]
        except argparse.ArgumentError as error:
            raise InputError(f"{path}: {key}: {error.message}") from None
    return settings


def _negates(action: argparse.Action, option: str) -> bool:
    """Whether an option is the --no- form of a switch; files use false instead."""
    return isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-")
