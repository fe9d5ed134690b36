"""Writes the file named by --results-file."""

import csv
import json
from pathlib import Path
from typing import Any

from vitoats.common.errors import RunError
from vitoats.common.files import atomic_write


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
