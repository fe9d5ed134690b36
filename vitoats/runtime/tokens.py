"""The tokenizer of an exported language model, read by the package tokenizers: no torch, no transformers."""

from pathlib import Path
from typing import Any

from vitoats.common.errors import InputError, one_line

FILE = "tokenizer.json"


def read_tokenizer(folder: str | Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a folder.

    Raises:
        InputError: there is none, it is damaged, or the package tokenizers is not installed.
    """
    folder = Path(folder)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError("text needs the package tokenizers: pip install tokenizers") from None
    if not (folder / FILE).is_file():
        raise InputError(f"{folder} has no {FILE}: export the model with its tokenizer")
    try:
        return Tokenizer.from_file(str(folder / FILE))
    except Exception as error:  # tokenizers has no public class of errors
        raise InputError(f"{folder / FILE} is damaged ({one_line(error, 100)}): export the model again") from None
