"""What a command has left in its place, without what may differ between two runs: times, manifests and logs."""

import csv
import fnmatch
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.attacks.commands import Command
from vitoats.common.manifest import is_record

TIMES = re.compile(r'"(seconds|tokens_per_second|sha256)": [^,}\n]*')  # the digest of a row is one of its time, too

CACHES = ("cache/", "features/")
OTHERS = "tmp/ort.quant.*"  # which ONNX Runtime's quantizer leaves in the system's temporary folder when it is killed


def result(place: Path) -> dict[str, bytes]:
    """All files but manifests and logs, by path below the place."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and not is_record(path.name))
    names = {str(path.relative_to(place)): path for path in files}
    return {name: _timeless(path) for name, path in names.items() if not fnmatch.fnmatch(name, OTHERS)}


def _timeless(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and "cache" not in path.parts:
        return TIMES.sub("", content.decode()).encode()
    if path.name == "rows.csv":
        rows = csv.DictReader(content.decode().splitlines())
        return json.dumps([{name: cell for name, cell in row.items() if name != "seconds"} for row in rows]).encode()
    return content


def differences(found: dict[str, bytes], whole: dict[str, bytes], caches: bool = True) -> list[str]:
    """What differs between two results, in words; without ``caches``, these may be missing."""
    may_miss = set() if caches else {name for name in whole if name.startswith(CACHES)}
    return [
        f"{name} is {'left over' if name not in whole else 'missing' if name not in found else 'different'}"
        for name in sorted({*found, *(whole.keys() - may_miss)})
        if found.get(name) != whole.get(name)
    ]


def half_written(command: Command, found: dict[str, bytes], whole: dict[str, bytes], before: dict[str, bytes]) -> Iterator[str]:
    """The names of results that are neither those of a whole run nor those that were there before."""
    for name in found.keys() & whole.keys():
        grows = any(fnmatch.fnmatch(name, pattern) for pattern in command.grows)
        if found[name] not in (whole[name], before.get(name)) and not grows:
            yield name


class Disk:
    """A file system in memory, which only root can mount; otherwise a folder."""

    def __init__(self, place: Path, mounted: bool):
        self.place, self.mounted = place, mounted
        place.mkdir()
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", str(place)], check=True)

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.place)], check=True)

    def empty(self) -> None:
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.place)], check=True)
        shutil.rmtree(self.place, ignore_errors=True)
