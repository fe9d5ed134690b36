"""The commands that the documents show have names and flags that exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from vitoats.cli import config_file
from vitoats.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/*.md"))]
COMMAND = re.compile(r"^ {4,}(?:python tools/(\w+)\.py|torchrun .*? tools/(\w+)\.py|vitoats (\w+))((?:.*\\\n)*.*)$", re.M)


class _ParsedError(Exception):
    pass


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The name and the flags of each command; other scripts are left out."""
    found = []
    for *names, rest in COMMAND.findall(page.read_text()):
        name = "".join(names)
        if name in COMMANDS and "..." not in rest:
            flags = re.sub(r"\$\w+", "1", rest.replace("\\\n", " "))  # the variable of a loop
            found.append((name, shlex.split(flags, comments=True)))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page, monkeypatch, capsys):
    real = config_file.parse

    def parse(parser, argv):
        real(parser, argv)
        raise _ParsedError

    monkeypatch.setattr(config_file, "parse", parse)
    for name, flags in commands(page):
        try:
            importlib.import_module(f"vitoats.cli.{name}").main(flags)
        except _ParsedError:
            continue
        except SystemExit:
            pytest.fail(f"{name} {shlex.join(flags)}: {capsys.readouterr().err}")


def test_most_commands_are_found():
    assert sum(len(commands(page)) for page in PAGES) > 70
