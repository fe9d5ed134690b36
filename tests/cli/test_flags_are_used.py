"""No command accepts a flag and ignores it."""

import argparse
import importlib
import inspect
import re

import pytest

from vitoats.cli import common, config_file, method_flags
from vitoats.cli.benchmark import BENCHMARKS
from vitoats.cli.main import COMMANDS

OF_EVERY_COMMAND = {"help", "version", "quiet", "results_file", "results_format", "config"}
WITHOUT_EFFECT = {  # as their help says
    ("eval_imagenet", "seed"), ("eval_perplexity", "seed"), ("eval_imagenet", "pretrained"),
}  # fmt: skip
TABLES = {  # names of flags that a function reads by a table
    r"common\.(load|source)\(|model_settings\(|settings\(|shared_settings": common.MODEL_FLAGS,
    r"[^_]settings\(args|shared_settings|SHARED": method_flags.SHARED,
    r"[^_]settings\(args": (*method_flags.SETTINGS, *method_flags.ALWAYS, "method_options"),
    r"shared_settings": ("data_dir", "nsamples"),
    r"read_options": ("options",),
}
NAMES = [*(name for name in COMMANDS if name != "benchmark"), *(f"benchmark.{name}" for name in BENCHMARKS)]


class _ParsedError(Exception):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_of_a_command_is_read(name, monkeypatch):
    made: list[argparse.ArgumentParser] = []

    def parse(parser, argv):
        made.append(parser)
        raise _ParsedError

    monkeypatch.setattr(config_file, "parse", parse)
    command = importlib.import_module(f"vitoats.cli.{name}")
    with pytest.raises(_ParsedError):
        command.main([])
    code = inspect.getsource(command)
    if name == "benchmark.op":
        code += inspect.getsource(importlib.import_module("vitoats.cli.benchmark.costs"))
    read = {flag for pattern, flags in TABLES.items() if re.search(pattern, code) for flag in flags}
    flags = {action.dest for action in made[0]._actions} - OF_EVERY_COMMAND
    ignored = {
        flag for flag in flags - read if not re.search(rf'args\.{flag}\b|"{flag}"', code) and (name, flag) not in WITHOUT_EFFECT
    }
    assert ignored == set()
