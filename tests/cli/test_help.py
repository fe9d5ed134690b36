"""The help of every command ends with at least two examples of it, whose flags it takes."""

import importlib
import re
import shlex

import pytest

from tests.cli.test_flags_are_used import NAMES
from vitoats.cli import config_file

EXAMPLE = re.compile(r"^ {4}vitoats (?:benchmark )?([\w-]+)((?:.*\\\n)*.*)$", re.M)


class _ParsedError(Exception):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_help_has_two_examples_whose_flags_parse(name, monkeypatch, capsys):
    command, found = importlib.import_module(f"vitoats.cli.{name}"), 0
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert not re.search(r"default:\s+[(\[{]", text)  # lists are shown as they are typed
    real = config_file.parse

    def parse(parser, argv):
        real(parser, argv)
        raise _ParsedError

    monkeypatch.setattr(config_file, "parse", parse)
    for about, flags in EXAMPLE.findall(text):
        if about == name.removeprefix("benchmark."):
            found += 1
            with pytest.raises(_ParsedError):
                command.main(shlex.split(re.sub(r" {3,}\(.*\)$", "", flags).replace("\\\n", " ")))
    assert found >= 2, text
