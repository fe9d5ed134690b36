"""Text: documents from files and folders, packed into windows."""

import json

import numpy as np
import pytest
import torch

from tests.language_models import PROSE, VOCABULARY, make_tokenizer
from vitoats.common.errors import InputError
from vitoats.data import text
from vitoats.data.images import SAMPLE
from vitoats.data.text import calibration_text, documents, open_text, pieces

DOCUMENTS = ["first document.", "the second one, a little longer.", "third"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, texts):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra lm)")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts, "n": list(range(len(texts)))}), path)
    else:
        path.write_text("".join(texts))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_documents_of_a_file(tmp_path, name):
    assert list(documents(str(write(tmp_path / name, [*DOCUMENTS, " "])))) == DOCUMENTS


def test_a_folder_is_read_in_order_and_other_files_are_left_out(tmp_path):
    for i, one in enumerate(DOCUMENTS):
        (tmp_path / f"{i}").mkdir()
        write(tmp_path / f"{i}/x.txt", [one])
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert list(documents(str(tmp_path))) == DOCUMENTS


def test_documents_are_packed_one_behind_the_other(tokenizer):
    windows = open_text(DOCUMENTS, tokenizer, 8, VOCABULARY)
    packed = torch.cat([windows[i][0] for i in range(len(windows))])
    expected = [ids for one in DOCUMENTS for ids in (*tokenizer(one).input_ids, tokenizer.eos_token_id)]
    assert packed.tolist() == expected[: len(packed)]
    assert len(expected) - len(packed) < 8
    assert windows.windows.dtype == torch.int64


def test_each_window_begins_as_the_tokenizer_begins_a_text():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    windows = open_text(DOCUMENTS, tokenizer, 8, VOCABULARY).windows
    assert (windows[:, 0] == 1).all()
    assert 1 not in windows[:, 1:]


def test_long_documents_are_cut_at_ends_of_lines(monkeypatch):
    monkeypatch.setattr(text, "PIECE", 100)
    found = list(pieces(PROSE))
    assert "".join(found) == PROSE
    assert len(found) > 10
    assert all(piece.endswith("\n") for piece in found[:-1])


def test_sources_are_used_in_equal_shares_and_held_out_windows_are_others(tokenizer):
    random = np.random.default_rng(0)
    lower, upper = ("".join(random.choice(list(letters), 1200)) for letters in ("abcdefgh", "ABCDEFGH"))
    drawn = calibration_text([[lower], [upper]], tokenizer, 16, VOCABULARY, nsamples=32, held_out=5, seed=1)
    batches = torch.cat(list(drawn.batches(8, 0)))
    of_first = (batches >= ord("a") - 28).any(dim=1)
    assert len(batches) == 32
    assert of_first.sum() == 16
    rest = torch.stack([drawn.held_out["1"][i][0] for i in range(5)])
    assert not any(torch.equal(one, used) for one in rest for used in batches[of_first])
    assert drawn.digests() != calibration_text([[PROSE]], tokenizer, 16, VOCABULARY, 32, 5, seed=2).digests()


def test_the_sample_is_prose_of_a_megabyte_at_most(tokenizer):
    found = list(documents(SAMPLE))
    assert text.SAMPLE_TEXT.stat().st_size < 1e6
    assert 0.9e6 < sum(map(len, found)) <= 1e6
    assert len(found) > 100


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", None, "there is no text"),
        ("a.pdf", "x", "is no .txt, .jsonl or .parquet file"),
        ("a.txt", "too short", "has 10 tokens, less than a window of 64"),
        ("a.txt", "", "has 0 tokens"),
        ("a.jsonl", '{"body": "x"}', "cannot be read as text"),
        ("a.jsonl", "{", "cannot be read as text"),
        ("a.parquet", "no parquet", "cannot be read as text"),
        ("a.txt", b"\xff\xfe\x00\xd8", "cannot be read as text"),
    ],
)
def test_bad_text_is_refused_in_one_line(tmp_path, tokenizer, name, content, said):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said) as refusal:
        open_text(str(path), tokenizer, 64, VOCABULARY)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_text_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match="there is no text in"):
        open_text(str(tmp_path), tokenizer, 8, VOCABULARY)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"the model knows 20: put the tokenizer that belongs to the model"):
        open_text([PROSE], tokenizer, 8, 20)


def test_too_few_windows_are_refused(tokenizer):
    with pytest.raises(InputError, match="too few to calibrate on"):
        calibration_text([[PROSE[:200]]], tokenizer, 64, VOCABULARY, nsamples=32, held_out=0, seed=0)
