"""The file that --results-file names."""

import csv
import json
from pathlib import Path
from typing import Any

from vitoats.common.errors import RunError
from vitoats.common.files import atomic_write


def write_results(path: Path, kind: str | None, result: dict[str, Any], line: str) -> None:
    """Writes a command's result.

    Args:
        path: where to.
        kind: "json" or "csv"; by the file's ending where None, and json where that says nothing.
        result: its columns; in CSV a list becomes its JSON text, None an empty cell.
        line: the same as a line of JSON.

    Raises:
        RunError: it cannot be written; the line is printed then.
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
