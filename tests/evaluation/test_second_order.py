"""Estimated effects of layers on predictions, against models that run changed."""

import copy
import dataclasses

import pytest
import torch

import vitoats
from tests.language_models import LENGTH, PROSE, VOCABULARY, make_model, make_tokenizer
from vitoats.calibration.hidden_states import HiddenStates
from vitoats.compression.sensitivity import measure_sensitivities
from vitoats.evaluation.second_order import PredictionEffects
from vitoats.loading.language_models import load_language_model
from vitoats.methods.oats_h import OATSHConfig
from vitoats.models.adapter import adapt
from vitoats.models.blocks import LinearLayer
from vitoats.models.inputs import TextInputs
from vitoats.models.on_disk import held

INPUTS = TextInputs(LENGTH, VOCABULARY)


def log_p(model, windows):
    with torch.no_grad():
        return INPUTS.call(model, windows).double().log_softmax(dim=-1)


def divergence(model, changed, windows):
    """Mean over tokens of KL(model || changed), in float64."""
    p, q = log_p(model, windows), log_p(changed, windows)
    return (p.exp() * (p - q)).sum(dim=-1).mean().item()


def estimates(adapter, windows, changes):
    """What is estimated if a share of random noise is added to one layer at a time."""
    effects = PredictionEffects(adapter, adapter.first_hidden(windows).clone())
    found, hidden = {}, adapter.first_hidden(windows).clone()
    for index, block in enumerate(adapter.blocks):
        with held(block.module), torch.no_grad():
            of_layers = effects.before(index, hidden)
            for layer in block.linears:
                weight, bias = changes[layer.name]
                found[layer.name] = of_layers.error(layer, weight, bias)
            hidden = block.run(hidden)
    return found


def changed_layers(adapter, share):
    generator = torch.Generator().manual_seed(0)

    def noisy(x):
        return x + share * x.std() * torch.randn(x.shape, generator=generator)

    found = {}
    for layer in adapter.linears:
        bias = layer.module.bias
        found[layer.name] = noisy(layer.module.weight), None if bias is None else bias + 0.002
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mamba", "phi3"])
def test_estimates_are_near_the_divergence_of_a_model_that_runs_changed(kind):
    model = make_model(kind)
    adapter, windows = adapt(model, INPUTS), INPUTS.noise(256, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changes = changed_layers(adapter, share=0.01)
    found = estimates(adapter, windows, changes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ratios = {}
    for layer in adapter.linears:
        changed = copy.deepcopy(model)
        module, (weight, bias) = changed.get_submodule(layer.name), changes[layer.name]
        module.weight.data = weight.data
        if bias is not None:
            module.bias.data = bias.data
        ratios[layer.name] = found[layer.name] / divergence(model, changed, windows)
    assert all(0.3 < ratio < 1.5 for ratio in ratios.values()), ratios  # attention mixes tokens, whose changes are correlated
    assert all(0.8 < ratio < 1.2 for name, ratio in ratios.items() if ".mlp." in name), ratios


def test_a_layer_that_no_later_token_sees_is_estimated_without_bias():
    """The last MLP: its changes of different tokens affect different predictions."""
    model = make_model("llama")
    adapter, windows = adapt(model, INPUTS), INPUTS.noise(512, seed=1)
    changes = changed_layers(adapter, share=0.01)
    found = estimates(adapter, windows, changes)
    for name in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.{name}"
        changed = copy.deepcopy(model)
        changed.get_submodule(name).weight.data = changes[name][0].data
        assert found[name] == pytest.approx(divergence(model, changed, windows), rel=0.1)


def test_blocks_on_disk_give_the_same(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    whole = adapt(make_model("llama"), INPUTS)
    streamed = load_language_model(f"local-dir:{tmp_path}", LENGTH, run_from_disk="cpu")
    assert any(p.is_meta for p in streamed.model.parameters())
    windows = INPUTS.noise(4, seed=1)
    changes = changed_layers(whole, share=0.1)
    assert estimates(adapt(streamed.model, INPUTS), windows, changes) == pytest.approx(estimates(whole, windows, changes))


def test_experts_without_tokens_have_no_effect():
    model = make_model("llama")
    adapter = adapt(model, INPUTS)
    block = adapter.blocks[0]
    unused = torch.nn.Linear(24, 24)
    model.add_module("unused", unused)
    hidden = adapter.first_hidden(INPUTS.noise(4, seed=1)).clone()
    effects = PredictionEffects(adapter, hidden)
    effects.blocks[0] = dataclasses.replace(block, linears=[*block.linears, LinearLayer(model, "unused", 1)])
    assert effects.before(0, hidden).error(LinearLayer(model, "unused", 1), torch.zeros(24, 24), None) == 0


def test_a_caller_in_inference_mode_gets_budgets_too():
    with torch.inference_mode():
        made = vitoats.compress(make_model("llama"), [PROSE], tokenizer=make_tokenizer(), nsamples=16, seq_len=16)
    assert made.about["recipe"]["allocation"] == "sensitivity"


def test_a_block_without_layers_to_compress_is_passed_over():
    model = make_model("llama")
    adapter, windows = adapt(model, INPUTS), INPUTS.noise(4, seed=1)
    first, last = adapter.blocks
    adapter = dataclasses.replace(adapter, blocks=[dataclasses.replace(first, linears=[]), last])
    hidden = HiddenStates.collect(adapter, iter([windows]), 4, 2)
    found = measure_sensitivities(adapter, hidden, OATSHConfig())
    assert [s.name for s in found] == [layer.name for layer in last.linears]
