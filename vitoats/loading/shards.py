"""The safetensors files of a transformers folder: one, or several with an index."""

import re
from pathlib import Path

from vitoats.common.errors import InputError
from vitoats.common.json_files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files with a folder's weights.

    Raises:
        InputError: there are none, or a shard is missing.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise InputError(f"{folder} holds no {SINGLE}: save the model with safetensors")
        return [folder / SINGLE]
    files = [folder / shard for shard in shard_names(folder / INDEX)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{folder} lacks {missing[0]}, which its index names: copy the folder again")
    return files


def shard_names(index: Path) -> list[str]:
    """The names of the files that an index names.

    Raises:
        InputError: the index is damaged.
    """
    said = read_json(index)
    shards = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(shards, dict) or not all(
        isinstance(x, str) and re.fullmatch(r"[\w.-]+\.safetensors", x) for x in shards.values()
    ):
        raise InputError(f"{index} is damaged: copy the folder again")
    return sorted(set(shards.values()))
