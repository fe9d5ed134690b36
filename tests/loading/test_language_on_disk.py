"""Language models whose blocks are read from their folder when they run."""

import json

import pytest
import safetensors.torch
import torch

from tests.language_models import PROSE, make_model, make_tokenizer, transformers
from vitoats import api
from vitoats.common.errors import InputError
from vitoats.loading import load
from vitoats.loading.language_checkpoint import tensor_files
from vitoats.loading.language_models import load_language_model
from vitoats.loading.language_on_disk import PieceByPiece
from vitoats.models.on_disk import on_disk

QUICK = {"seq_len": 16, "nsamples": 24, "iterations": 2, "compression": 0.4, "method": "oats"}
TOKENS = torch.arange(5, 35).view(2, 15)


def sharded(folder, kind, dtype=torch.float32, **changes):
    """A folder of several files."""
    model = make_model(kind, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size="8KB")
    make_tokenizer().save_pretrained(folder)
    assert len(tensor_files(folder)) > 1
    return folder


def tensors(folder):
    return {name: x for file in tensor_files(folder) for name, x in safetensors.torch.load_file(file).items()}


def figures(folder):
    said = json.loads((folder / "vitoats.json").read_text())
    return {key: said[key] for key in ("layers", "budgets", "counts_before", "counts", "feature_error", "flops", "row_blocks")}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"method": "oats-h", "iterations": 4, "allocation": "sensitivity"}),
        ("qwen3", {"target": "residual", "method": "alps"}),
        ("phi3", {"allocation": "owl"}),
        ("gemma3_text", {"target": "sequential"}),
        ("gpt2", {"refit_bias": True, "method": "sparsegpt", "target": "dense"}),
        ("opt", {"weights": "int8"}),
    ],
)
def test_the_result_is_that_of_a_model_in_memory(tmp_path, kind, settings):
    if settings.get("method") in ("alps", "sparsegpt"):
        settings = {"iterations": None} | settings
    settings = QUICK | settings
    dense = sharded(tmp_path / "dense", kind)
    stock = transformers.AutoModelForCausalLM.from_pretrained(dense)
    of_disk = api.compress(f"local-dir:{dense}", [PROSE], **settings)
    in_memory = api.compress(stock, [PROSE], tokenizer=make_tokenizer(), **settings)
    for form in ("factored", "dense"):
        of_disk.save(tmp_path / f"disk-{form}", format=form)
        in_memory.save(tmp_path / f"memory-{form}", format=form)
        found, expected = tensors(tmp_path / f"disk-{form}"), tensors(tmp_path / f"memory-{form}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert figures(tmp_path / "disk-factored") == figures(tmp_path / "memory-factored")
    assert of_disk.loaded.disk is not None
    logits = of_disk.model(input_ids=TOKENS).logits
    assert of_disk.loaded.disk is None
    assert torch.equal(logits, in_memory.model(input_ids=TOKENS).logits)
    of_disk.save(tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == tensors(tmp_path / "disk-factored").keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_types_of_the_source_are_kept(tmp_path, dtype):
    dense = sharded(tmp_path / "dense", "llama", dtype)
    compressed = api.compress(f"local-dir:{dense}", [PROSE], **QUICK)
    compressed.save(tmp_path / "out")
    compressed.save(tmp_path / "folded", format="dense")
    for form in ("out", "folded"):
        held = tensors(tmp_path / form)
        assert {x.dtype for name, x in held.items() if not name.endswith("mask")} == {dtype}
        assert json.loads((tmp_path / form / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    said = json.loads((tmp_path / "out" / "vitoats.json").read_text())
    assert said["counts_before"]["bytes"] == sum(x.nbytes for x in tensors(dense).values())
    assert said["counts"]["bytes"] == sum(x.nbytes for x in tensors(tmp_path / "out").values())
    loaded = load.load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded(input_ids=TOKENS).logits, compressed.model(input_ids=TOKENS).logits)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    torch.testing.assert_close(stock(input_ids=TOKENS).logits, loaded(input_ids=TOKENS).logits, atol=0.3, rtol=0.05)


def test_a_block_is_in_memory_only_while_it_runs(tmp_path):
    loaded = load_language_model(f"local-dir:{sharded(tmp_path / 'dense', 'llama')}", 16, run_from_disk="cpu")
    model, seen = loaded.model, []
    for block in model.model.layers:
        assert on_disk(block) is not None
        block.register_forward_hook(
            lambda *_: seen.append([not next(other.parameters()).is_meta for other in model.model.layers])
        )
    assert on_disk(model.lm_head) is not None
    logits = model(input_ids=TOKENS).logits
    assert torch.equal(logits, make_model("llama")(input_ids=TOKENS).logits)
    assert seen == [[False, False], [False, False]]  # each was dropped before the test's own hook ran
    assert all(p.is_meta for block in model.model.layers for p in block.parameters())


def test_other_names_of_tensors_are_read_into_memory(tmp_path):
    """The files of GPT-2 on the Hub lack the model's prefix; transformers adds it."""
    dense = sharded(tmp_path / "dense", "gpt2")
    held = {name.removeprefix("transformer."): x for name, x in tensors(dense).items()}
    for file in (*tensor_files(dense), dense / "model.safetensors.index.json"):
        file.unlink()
    safetensors.torch.save_file(held, dense / "model.safetensors", {"format": "pt"})
    loaded = load_language_model(f"local-dir:{dense}", 16, run_from_disk="cpu")
    assert loaded.disk is None
    assert torch.equal(loaded.model(input_ids=TOKENS).logits, make_model("gpt2")(input_ids=TOKENS).logits)


def test_a_shard_that_is_cut_short_or_missing(tmp_path):
    dense = sharded(tmp_path / "dense", "llama")
    shard = tensor_files(dense)[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"cannot be loaded .*: copy the folder again"):
        load_language_model(f"local-dir:{dense}", 16, run_from_disk="cpu")
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks {shard.name}"):
        load_language_model(f"local-dir:{dense}", 16, run_from_disk="cpu")


def test_tensors_are_read_a_piece_at_a_time():
    reads = []

    def read(piece):
        reads.append(piece)
        return {name: torch.full((1,), float(name[1])) for name in pieces[piece]}

    pieces = {"a": ["a1", "a2"], "b": ["b3"]}
    found = PieceByPiece(pieces, read)
    assert list(found) == ["a1", "a2", "b3"]
    assert [x.item() for x in found.values()] == [1, 2, 3]
    assert reads == ["a", "b"]
