"""Text: documents from files, folders or memory, packed into windows of tokens."""

import gzip
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from vitoats.common.errors import InputError, one_line
from vitoats.data.calibration import CalibrationImages, split
from vitoats.data.images import FEWEST_IMAGES, SAMPLE, shuffled

log = logging.getLogger("vitoats")

SAMPLE_TEXT = Path(__file__).parent / "sample_text.txt.gz"
ENDINGS = (".txt", ".jsonl", ".parquet")
FIELD = "text"  # of a line of JSON, or a column
PIECE = 50_000  # characters of a long document that are tokenized at a time; it is cut at the end of a line
LARGEST = 2**31  # bytes of a file


class TokenWindows(Dataset):
    """Windows of tokens; an item is (int64 [seq_len], -1), like an image without a label."""

    labels = None
    classes: tuple[str, ...] = ()

    def __init__(self, windows: Tensor):
        """``windows``: int64 [n, seq_len]."""
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.windows[index], -1

    def content(self, index: int) -> bytes:
        """The bytes of a window's tokens."""
        return self.windows[index].numpy().tobytes()


def open_text(source: Any, tokenizer: Any, seq_len: int, vocab_size: int) -> TokenWindows:
    """Reads, tokenizes and packs text.

    Documents follow each other, with the tokenizer's end-of-text token behind each, and are cut into windows; what is left at
    the end is dropped. Where the tokenizer begins a text with a token of its own, each window begins with it.

    Args:
        source: a .txt, .jsonl (with "text") or .parquet (with a column "text") file, a folder of these, "sample", or strings.
        tokenizer: a transformers tokenizer.
        seq_len: number of tokens of a window.
        vocab_size: number of tokens that the model knows.

    Raises:
        InputError: the text cannot be read or is too short, or the tokenizer does not belong to the model.
    """
    name = source if isinstance(source, str) else "the text"
    first = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    tokens = token_stream(documents(source), tokenizer)
    length = seq_len - len(first)
    n = len(tokens) // length
    if n == 0:
        raise InputError(
            f"{name} has {len(tokens):,} tokens, less than a window of {seq_len}: give `images` more text, or lower `seq_len`"
        )
    if int(tokens.max()) >= vocab_size:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, but the model knows {vocab_size}: "
            "put the tokenizer that belongs to the model in its folder"
        )
    windows = tokens[: n * length].view(n, length)
    return TokenWindows(torch.cat([torch.tensor(first, dtype=torch.long).expand(n, -1), windows], dim=1))


def token_stream(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """The tokens [n] of all documents, int64, with the end-of-text token, if there is one, behind each document."""
    found: list[Tensor] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        for ids in tokenizer(list(pieces(text)), add_special_tokens=False, verbose=False).input_ids:
            found.append(torch.tensor(ids, dtype=torch.long))
        found.append(torch.tensor(end, dtype=torch.long))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def pieces(text: str) -> Iterator[str]:
    """Cuts a long document at ends of lines, since tokenizers are slow on very long strings."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def documents(source: Any) -> Iterator[str]:
    """The documents of a source that are not empty (``open_text``).

    Raises:
        InputError: a file does not exist, cannot be read, or holds no text.
    """
    texts = iter(source) if not isinstance(source, str) else _in_files(source)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"text in memory is a list of strings, not of {type(text).__name__}: give `images` these")
        if text.strip():
            yield text


def _in_files(source: str) -> Iterator[str]:
    if source == SAMPLE:
        with gzip.open(SAMPLE_TEXT, "rt", encoding="utf-8") as packed:
            yield from packed.read().split("\f")
        return
    path = Path(source)
    files = sorted(file for file in path.rglob("*") if file.suffix in ENDINGS) if path.is_dir() else [path]
    if not files:
        raise InputError(f"there is no text in {path}: give `images` .txt, .jsonl or .parquet files, or folders of these")
    for file in files:
        try:
            if not file.is_file():
                raise InputError(
                    f"there is no text {file}: give `images` a .txt, .jsonl or .parquet file, or a folder of these"
                )
            if file.stat().st_size > LARGEST:
                raise InputError(f"{file} has more than {LARGEST:,} bytes: give `images` a part of it")
            yield from _read(file)
        except InputError:
            raise
        except Exception as error:  # the readers raise various errors on damaged files
            raise InputError(f"{file} cannot be read as text ({one_line(error, 100)}): give `images` another file") from None


def _read(file: Path) -> Iterator[str]:
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise InputError(f"{file} needs the package pyarrow: pip install pyarrow") from None
        yield from parquet.read_table(file, columns=[FIELD])[FIELD].to_pylist()
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                text = json.loads(line).get(FIELD) if line.strip() else ""
                if not isinstance(text, str):
                    raise ValueError(f'line {number} has no "{FIELD}"')
                yield text
    elif file.suffix == ".txt":
        yield file.read_text(encoding="utf-8")
    else:
        raise InputError(f"{file} is no .txt, .jsonl or .parquet file: give `images` one of these")


def calibration_text(
    sources: list[Any], tokenizer: Any, seq_len: int, vocab_size: int, nsamples: int, held_out: int, seed: int
) -> CalibrationImages:
    """Opens texts and draws windows from each in equal shares, and others that are held out.

    Args:
        sources: as for ``open_text``.
        tokenizer, seq_len, vocab_size: as for ``open_text``.
        nsamples: total number of windows.
        held_out: number of windows of each source to hold out, if that many are left.
        seed: seed of the draws.

    Raises:
        InputError: as for ``open_text``; or a source has too few windows.
    """
    named = {"own" if len(sources) == 1 else source_name(source, i): source for i, source in enumerate(sources)}
    opened, taken, rest = {}, {}, {}
    for name, share in split(nsamples, dict.fromkeys(named, 1)).items():
        windows = open_text(named[name], tokenizer, seq_len, vocab_size)
        if len(windows) < min(share, FEWEST_IMAGES):
            raise InputError(
                f"{name} has {len(windows)} windows of {seq_len} tokens, too few to calibrate on: "
                "give `images` more text, or lower `seq_len`"
            )
        opened[name], taken[name] = windows, min(share, len(windows))
        rest[name] = Subset(windows, shuffled(windows, seed)[share : share + held_out])
        log.info("text %s: %d windows of %d tokens", name, len(windows), seq_len)
    return CalibrationImages(opened, taken, {name: some for name, some in rest.items() if len(some)}, seed)


def source_name(source: Any, index: int) -> str:
    """A short name of one of several sources."""
    return f"{index + 1}:{Path(source).name}" if isinstance(source, str) else f"{index + 1}"
