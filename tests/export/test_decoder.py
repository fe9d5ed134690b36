"""Language models in ONNX with a key-value cache, against torch; and what is not exported."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.language_models import PROSE, make_model, make_tokenizer
from vitoats import api
from vitoats.cli.eval_perplexity import main as eval_perplexity
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.cli.generate import main as generate
from vitoats.common.errors import InputError, RunError
from vitoats.export.decoder import export_decoder
from vitoats.export.genai_builder import check_buildable
from vitoats.export.verify_decoder import as_stored, verify_decoder
from vitoats.format.operator import DOMAIN
from vitoats.loading.language_models import language_model_in_memory
from vitoats.runtime.decoder import Decoder, is_decoder
from vitoats.runtime.inference import session

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed (the extra genai)")

SIZES = {"hidden_size": 64, "intermediate_size": 80, "head_dim": 16}
PHI = {"original_max_position_embeddings": 64}
QUICK = {"seq_len": 16, "nsamples": 24, "iterations": 2, "compression": 0.5, "method": "oats"}
ROUND_OFF = 1e-5  # of the largest logit


def compressed(kind, **changes):
    return api.compress(make_model(kind, **SIZES, **changes), [PROSE], tokenizer=make_tokenizer(), **QUICK)


def agrees(loaded, folder, tolerance=ROUND_OFF, **options):
    decoder = Decoder(folder, threads=1, **options)
    agreement = verify_decoder(loaded, decoder)
    assert agreement.relative_error < tolerance
    assert agreement.step_error < tolerance
    assert agreement.near_tie
    return decoder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A compressed model, and its folder, as the command writes it."""
    found, folder = compressed("llama"), tmp_path_factory.mktemp("llama")
    found.save(folder / "torch")
    export_onnx([str(folder / "torch"), "-o", str(folder / "onnx"), "--genai-library"])
    return found.loaded, folder


def test_a_compressed_llama_says_what_torch_says(llama):
    loaded, folder = llama
    decoder = agrees(loaded, folder / "onnx")
    assert len(decoder.session.native_nodes) == 14  # q, k, v, o, gate, up and down of both blocks
    assert is_decoder(folder / "onnx" / "model.onnx")


def test_logits_that_are_not_finite_are_no_agreement(llama):
    loaded, folder = llama
    broken = copy.deepcopy(loaded)
    with torch.inference_mode():
        broken.model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(RunError, match="logits of the torch model are not finite"):
        verify_decoder(broken, Decoder(folder / "onnx", threads=1))


@pytest.mark.filterwarnings("ignore")
def test_without_the_native_library_it_computes_the_same(llama, monkeypatch):
    loaded, folder = llama
    agrees(loaded, folder / "onnx", native=False)
    monkeypatch.setattr("vitoats.runtime.inference.densified", lambda _: None)  # the bodies of the functions
    agrees(loaded, folder / "onnx", native=False)


def test_onnxruntime_genai_runs_it_with_the_library_in_the_folder(llama):
    import onnxruntime_genai as genai

    folder = llama[1]
    prompt, n = list(range(10, 20)), 20
    model = genai.Model(str(folder / "onnx"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + n, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0)[len(prompt) :].tolist()
    expected = list(Decoder(folder / "onnx").generate(prompt, n))
    assert found == expected[: len(found)]
    assert len(found) >= len(expected) - 1  # it does not give the token that ends a text
    config = json.loads((folder / "onnx" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == "libvitoats_ops.so"


def test_its_perplexity_is_that_of_torch_and_it_continues_a_text(succeed, llama, tmp_path):
    _, folder = llama
    prose = tmp_path / "prose.txt"
    prose.write_text(PROSE)
    flags = ["--data-dir", prose, "--max-tokens", 300, "--context", 24]
    line = succeed(eval_perplexity, "--model", folder / "onnx" / "model.onnx", *flags, "--against", folder / "torch")
    assert line["perplexity"] == pytest.approx(line["against_perplexity"], rel=1e-5)
    assert line["n_tokens"] == 299
    line = succeed(generate, "--model", folder / "onnx", "--prompt", "The ships", "--max-new-tokens", 7, "--threads", 1)
    ids = torch.tensor([make_tokenizer()("The ships").input_ids])
    answer = llama[0].model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert line["text"] == make_tokenizer().backend_tokenizer.decode(answer.tolist())
    assert line["prompt_tokens"] == 9
    assert line["native_nodes"] == 14


def test_int8_rounds_all_products_and_the_head(llama, tmp_path):
    loaded, rounded = llama[0], as_stored(llama[0], int8=True)
    proto = export_decoder(loaded, tmp_path / "onnx", int8=True)
    assert not any(node.op_type == "MatMul" for node in proto.graph.node)
    agrees(rounded, tmp_path / "onnx", tolerance=0.02)  # a tie of a rounded token goes either way
    for name, x, y in products(tmp_path / "onnx", np.arange(5, 21)[None]):
        layer = rounded.model.get_submodule(name.replace(".attn.", ".self_attn."))
        expected = layer(torch.tensor(x))
        assert (torch.tensor(y) - expected).norm() < 1e-3 * expected.norm()  # the same inputs: only U and V round once more


def products(folder, tokens):
    """What goes into each operator of ours, and what comes out, with the name of its layer."""
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    known = {value.name for value in proto.graph.output}
    for name in {name for node in nodes for name in (node.input[0], node.output[0])} - known:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(proto, folder / "products.onnx")
    opened = session(folder / "products.onnx", 1)
    sizes = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    empty = np.zeros((1, sizes["num_key_value_heads"], 0, sizes["head_size"]), np.float32)
    feed = {i.name: empty for i in opened.get_inputs() if i.name.startswith("past")}
    feed |= {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.arange(tokens.size)[None]}
    names = [output.name for output in opened.get_outputs()]
    found = dict(zip(names, opened.run(names, {i.name: feed[i.name] for i in opened.get_inputs()}), strict=True))
    for node in nodes:
        layer = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
        yield layer, found[node.input[0]], found[node.output[0]]


@pytest.mark.parametrize(("kind", "changes"), [("qwen2", {}), ("phi3", PHI)])
def test_biases_and_fused_layers_of_other_families(tmp_path, kind, changes):
    found = compressed(kind, **changes)
    for name, parameter in found.loaded.model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.5 * torch.randn_like(parameter)
    api.export_onnx(found, tmp_path / "onnx", float16=kind == "phi3")
    proto = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert sum(node.op_type == "SparseMatMul" for node in proto.graph.node) == 14
    assert not any(node.op_type == "Add" and "proj" in node.name for node in proto.graph.node)
    agrees(as_stored(found.loaded, float16=kind == "phi3"), tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "mistral", "granite"])
def test_further_families(tmp_path, kind):
    found = compressed(kind, **({"sliding_window": None} if kind == "mistral" else {}))
    export_decoder(found.loaded, tmp_path / "onnx")
    agrees(found.loaded, tmp_path / "onnx")


@pytest.fixture
def embedded() -> Path:
    """The folder of the embedded model, where its package is installed."""
    from vitoats.loading.smollm2 import smollm2_folder

    try:
        return smollm2_folder()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_embedded_tokenizer_ends_text_as_the_file_says(embedded):
    """transformers 5.17 took the token that begins a message instead."""
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(embedded).eos_token == "<|im_end|>"


@pytest.mark.slow
def test_the_embedded_model_says_what_torch_says(embedded, succeed, tmp_path):
    """The same 64 tokens, or the first that differs was almost a tie."""
    line = succeed(export_onnx, "--model", "smollm2", "-o", tmp_path / "onnx", "--verify")
    assert max(line["relative_error"], line["step_error"]) < 1e-4
    assert line["n_tokens"] == 64
    assert line["near_tie"]
    assert line["rounding"] < 1e-3


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gpt2", {}, "GPT2LMHeadModel has no ONNX export"),
        ("mamba", {}, "MambaForCausalLM has no ONNX export"),
        ("llama", {}, "6 wide"),
        ("mistral", SIZES, "knows no `sliding_window` of 4"),
        ("llama", SIZES | {"intermediate_size": 96}, "takes it for the head"),
    ],
)
def test_models_that_the_builder_does_not_take_are_refused(kind, changes, reason):
    with pytest.raises(InputError, match=reason):
        check_buildable(make_model(kind, **changes))


def test_forms_that_only_vision_models_have_are_refused(llama, tmp_path):
    with pytest.raises(InputError, match="no form 'inline'"):
        api.export_onnx(llama[1] / "torch", tmp_path / "a", form="inline")


def test_flags_for_images_are_refused(refuse, llama, tmp_path):
    folder = llama[1] / "torch"
    assert "--inline is for vision models" in refuse(export_onnx, folder, "-o", tmp_path / "a", "--inline")
    assert "give --output" in refuse(export_onnx, folder, "-o", tmp_path / "a.onnx")
    assert "leave that out" in refuse(export_onnx, folder, "-o", tmp_path / "a", "--int8", "--float16")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    loaded = language_model_in_memory(make_model("llama", **SIZES), None)
    with pytest.raises(InputError, match="no tokenizer"):
        export_decoder(loaded, tmp_path / "onnx")


def test_random_weights_that_are_alike_find_a_layer_each():
    from vitoats.export.swap_products import _Rows
    from vitoats.format.layers import SparseLowRankLinear

    S = torch.eye(6)
    layers = {name: SparseLowRankLinear(S.clone(), [torch.zeros(6, 0)], [torch.zeros(0, 6)]) for name in "ab"}
    rows = _Rows(layers)
    assert rows.layer_of(np.eye(5, 6, dtype=np.float32)) is not None
    assert rows.layer_of(np.ones((5, 6), np.float32)) is None
