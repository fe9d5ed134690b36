"""The variants of a small language model: their files, and that each of them is asked the same."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.cli.test_benchmark import check_keys
from vitoats.benchmark import decode_files
from vitoats.benchmark.decode import compare_decoders
from vitoats.benchmark.engines import LlamaCppEngine, OnnxEngine, has_llama_cpp
from vitoats.benchmark.generated_model import LlamaSize, generated_model
from vitoats.cli.benchmark import main
from vitoats.format.int8 import dequantized, round_rows

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed (the extra genai)")

SIZE = LlamaSize(hidden_size=64, layers=2, intermediate_size=96, heads=4, kv_heads=2, vocab_size=200)
FLAGS = [f"--{field.name.replace('_', '-')}={getattr(SIZE, field.name)}" for field in dataclasses.fields(SIZE)]
RUN = ["--prefill=12", "--steps=3", "--rounds=2", "--threads=1"]
DECODE = "model processor isa cache_mb variants prefill steps rows"
DECODE_ROW = "threads variant prefill_tokens_per_second decode_tokens_per_second decode_ms speedup speedup_int8 file_mb"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The dense model, and zeros at 40 %."""
    folder = tmp_path_factory.mktemp("decode")
    decode_files.make_variants(lambda: generated_model(SIZE, 0), folder, ("unstructured-40",), 0.25, 0)
    return folder


def test_a_variant_without_low_rank_terms_has_zeros_alone(files):
    decoder = OnnxEngine(files / "unstructured-40", 20, 1).decoder
    assert len(decoder.session.native_nodes) == 14
    assert decode_files.megabytes(files / "unstructured-40") < decode_files.megabytes(files / "dense")


def test_variants_take_turns_and_the_dense_one_is_the_measure(files):
    variants = {name: files / name for name in ("dense", "unstructured-40")}
    stages = []
    rows = compare_decoders(variants, [1], 12, 3, 2, progress=lambda done, total, what: stages.append((done, total, what)))
    assert stages == [(i, 4, f"{name}, 1 threads") for i, name in enumerate(["dense", "unstructured-40"] * 2)]
    assert [row.variant for row in rows] == list(variants)
    assert rows[0].speedup == 1
    assert rows[0].speedup_int8 is None


def test_files_that_are_there_are_used_and_those_of_another_model_refused(files, succeed, refuse, monkeypatch):
    monkeypatch.setattr("vitoats.benchmark.decode_files.build_graph", None)  # nothing is built again
    flags = ["decode", "--model", "generated", *FLAGS, "--keep", files, "--variant", "unstructured-40"]
    line = succeed(main, *flags, *RUN)
    check_keys(line, DECODE, DECODE_ROW)
    assert line["variants"] == ["dense", "unstructured-40"]
    assert "files of another model" in refuse(main, *flags, "--layers", 3)


def test_names_are_checked_before_anything_is_made(refuse, tmp_path):
    assert "there is no variant x" in refuse(main, "decode", "--variant", "x")
    assert "--make-only leaves files in --keep" in refuse(main, "decode", "--make-only")


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")
def test_llama_cpp_computes_what_torch_does(tmp_path):
    """Up to its 8 bits."""
    from vitoats.benchmark.gguf_file import write_gguf

    dense = generated_model(SIZE, 0)
    tokens = np.arange(10, 22)
    write_gguf(dense.model, tmp_path / "model.gguf")
    engine = LlamaCppEngine(tmp_path / "model.gguf", 20, 1, SIZE.vocab_size)
    found = [engine.extend(tokens[:9]).copy(), *(engine.extend(tokens[i : i + 1]).copy() for i in (9, 10, 11))]
    engine.start()
    again = engine.extend(tokens[:9]).copy()
    engine.close()
    for parameter in dense.model.parameters():
        if parameter.ndim == 2:
            parameter.data = dequantized(*round_rows(parameter.data))
    expected = dense.model(input_ids=torch.tensor(tokens[None])).logits[0, 8:].numpy()
    assert np.abs(np.stack(found) - expected).max() < 0.03 * np.abs(expected).max()
    assert np.array_equal(again, found[0])


@pytest.mark.slow
def test_all_variants_of_a_small_model_run(succeed, tmp_path):
    line = succeed(main, "decode", "--model", "generated", *FLAGS, "--keep", tmp_path / "files", *RUN)
    lacking = set() if has_llama_cpp() else {decode_files.LLAMA}
    assert set(line["variants"]) == set(decode_files.NAMES) - lacking
    assert {row["variant"] for row in line["rows"]} == set(line["variants"])
