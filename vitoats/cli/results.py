"""Writes the file named by --results-file, and reads it again."""

import csv
import json
from pathlib import Path
from typing import Any

from vitoats.common.errors import InputError, RunError
from vitoats.common.files import atomic_write
from vitoats.common.json_files import LARGEST, parse_json, read_json
from vitoats.common.whole_files import read_text


def write_results(path: Path, kind: str | None, result: dict[str, Any], line: str) -> None:
    """Writes a command's result.

    Args:
        path: the file to write.
        kind: "json" or "csv"; None for "csv" if the file name ends in .csv, otherwise "json".
        result: values by column; in CSV, lists and objects are written as JSON, None as an empty cell.
        line: the result as a line of JSON.

    Raises:
        RunError: the file cannot be written; in this case the line is printed first.
    """
    try:
        with atomic_write(path, "give another --results-file") as partial, partial.open("w", newline="") as file:
            if (kind or path.suffix.lstrip(".")) == "csv":
                writer = csv.DictWriter(file, result, lineterminator="\n")
                writer.writeheader()
                writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in result.items()})
            else:
                file.write(line + "\n")
    except RunError:
        print(line, flush=True)
        raise


def read_results(path: Path) -> list[Any]:
    """Reads a command's results: one from a JSON file, one from each row of a CSV file.

    Raises:
        InputError: the file does not exist or is damaged.
    """
    try:
        text = read_text(path, LARGEST)
        if not text.lstrip().startswith(("{", "[")):
            return [_values(row) for row in csv.DictReader(text.splitlines())]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): write it again with --results-file") from None
    return [read_json(path)]


def _values(row: dict[str, Any]) -> dict[str, Any]:
    """The cells of a row by column; those beyond the columns are left out."""
    return {name: _value(cell) for name, cell in row.items() if isinstance(name, str)}


def _value(cell: str | None) -> Any:
    """A cell of a CSV file: a number, a list or an object as JSON, None if it is empty, or text."""
    try:
        return parse_json(cell) if cell else None
    except ValueError:
        return cell
