"""Flags whose values may stand in a YAML file."""

import argparse
import difflib
from pathlib import Path
from typing import Any

from vitoats.common.errors import InputError


def parse(made: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parses flags; those not given come from ``--config FILE`` (YAML: flag names without dashes), then from the defaults.

    Raises:
        InputError: a flag or the file is wrong.
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
            if any(getattr(given, name, None) not in (None, made.get_default(name)) for name in names):  # a flag beats the file
                settings = {name: value for name, value in settings.items() if name not in names}
        made.set_defaults(**settings)
    return made.parse_args(argv)


def first_look(argv: list[str], complain: bool) -> argparse.Namespace:
    """The flags that matter before a command's own parser is known, those in a config file included."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--quiet", action="store_true")
    first.add_argument("--results-file", type=Path)
    first.add_argument("--results-format")
    try:
        found = first.parse_known_args(argv)[0]
        values = {} if found.config is None else _read_config(found.config)
    except argparse.ArgumentError:  # the command's own parser says it
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
    """A YAML file of settings, every value as the text it is: 2:4 stays 2:4, and passes the same checks as a flag's."""
    import yaml

    try:
        values = yaml.load(path.read_text(), Loader=yaml.BaseLoader) or {}
    except OSError as error:
        raise InputError(f"the config file {path} cannot be read ({error.strerror}): give --config a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the config file {path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise InputError(f"the config file {path} holds no settings: write lines such as 'compression: 0.5'")
    return values


def _settings(path: Path, made: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings of a config file as values of a parser's flags; an empty one stays at its default."""
    actions = {
        option.lstrip("-").replace("-", "_"): action
        for action in made._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("help", "config")
    }
    settings = {}
    for key, text in _read_config(path).items():
        action = actions.get(key.replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(key, actions, n=1)
            hint = f", did you mean {near[0]}?" if near else f" (see {made.prog} --help)"
            raise InputError(f"{path}: unknown setting {key!r}{hint}")
        if text == "":
            continue
        if not isinstance(text, str):
            raise InputError(f"{path}: {key} takes one value, not {text!r}")
        if action.nargs == 0:
            if text.lower() not in ("true", "false"):
                raise InputError(f"{path}: {key} is true or false, not {text!r}")
            settings[action.dest] = text.lower() == "true"
            continue
        try:
            settings[action.dest] = made._get_value(action, text)
            made._check_value(action, settings[action.dest])
        except argparse.ArgumentError as error:
            raise InputError(f"{path}: {key}: {error.message}") from None
    return settings
