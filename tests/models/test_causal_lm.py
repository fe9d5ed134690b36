"""Language models as chains of blocks: all families by structure, each block replayed from its own arguments."""

import copy

import pytest
import torch
from torch import nn

import vitoats
from tests.language_models import CONFIGS, LENGTH, PROSE, VOCABULARY, make_model, make_tokenizer, transformers
from vitoats.common.errors import InputError
from vitoats.models.adapter import adapt
from vitoats.models.hooks import watch_outputs
from vitoats.models.inputs import TextInputs

INPUTS = TextInputs(LENGTH, VOCABULARY)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LINEARS = {  # of a block, in the order of their calls
    "llama": [*ATTENTION, *MLP],
    "mistral": [*ATTENTION, *MLP],
    "qwen2": [*ATTENTION, *MLP],
    "qwen3": [*ATTENTION, *MLP],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gemma2": [*ATTENTION, *MLP],
    "gemma3_text": [*ATTENTION, *MLP],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_one_by_one_compute_what_the_model_does(kind):
    model = make_model(kind)
    tokens = INPUTS.noise(3)
    expected = INPUTS.call(model, tokens)
    adapter = adapt(model, INPUTS)
    torch.testing.assert_close(INPUTS.call(model, tokens), expected)  # also where GPT-2's layers were transposed
    assert len(adapter.blocks) == 2
    if kind in LINEARS:
        assert [layer.name.rpartition(".")[2] for layer in adapter.blocks[0].linears] == LINEARS[kind]
    with torch.inference_mode():
        hidden = adapter.first_hidden(tokens)
        for block in adapter.blocks:
            assert tuple(hidden.shape[1:]) == block.shape_before
            hidden = block.run(hidden)
        torch.testing.assert_close(torch.cat(list(INPUTS.logits_of(model, hidden))), expected.flatten(0, 1))
        torch.testing.assert_close(INPUTS.features_of(model, hidden), INPUTS.features(model, tokens))
    torch.testing.assert_close(INPUTS.call(model, tokens), expected)  # nothing is left patched


def test_grouped_queries_keys_and_values_are_matrices_of_their_own():
    layers = {layer.name.rpartition(".")[2]: layer for layer in adapt(make_model("phi3"), INPUTS).blocks[0].linears}
    assert layers["qkv_proj"].heights == (24, 12, 12)
    assert layers["gate_up_proj"].heights == (40, 40)
    assert layers["o_proj"].heights == (24,)
    assert layers["qkv_proj"].whole().heights == (48,)


def test_embeddings_and_head_stay_dense_and_the_reason_says_so():
    tied = dict(adapt(make_model("llama", tie_word_embeddings=True), INPUTS).skipped)
    assert tied == {"model.embed_tokens": "an embedding", "lm_head": "tied to the embedding"}
    free = dict(adapt(make_model("llama", tie_word_embeddings=False), INPUTS).skipped)
    assert free["lm_head"] == "outside the blocks"


def test_masks_are_kept_for_each_block():
    first, second = adapt(make_model("gemma2"), INPUTS).blocks
    masks = [block.call.kwargs["attention_mask"] for block in (first, second)]
    assert masks[0] is None or masks[1] is None or not torch.equal(*masks)


def test_experts_in_one_parameter_are_refused_with_the_reason():
    with pytest.raises(InputError, match=r"stacks the matrices of its 4 experts in one parameter"):
        adapt(make_model("mixtral"), INPUTS)


class Experts(nn.Module):
    """A mixture whose experts are linear layers, each called with the tokens that reach it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(24, 4, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(4)])

    def forward(self, hidden):
        tokens = hidden.flatten(0, 1)
        chosen, out = self.gate(tokens).argmax(dim=-1), torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(tokens[chosen == i])
        return out.view(hidden.shape)


def test_experts_that_are_linears_are_compressed_and_the_router_is_not():
    model = make_model("llama")
    model.config.num_experts = 4
    for layer in model.model.layers:
        layer.mlp = Experts()
    adapter = adapt(model.eval(), INPUTS)
    names = [layer.name for layer in adapter.blocks[1].linears]
    assert [f"model.layers.1.mlp.experts.{i}.0" for i in range(4)] == names[4:]
    assert dict(adapter.skipped)["model.layers.1.mlp.gate"] == "a router"


def test_each_expert_is_measured_on_the_tokens_that_reach_it():
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp = Experts()
    small = vitoats.compress(
        model.eval(), [PROSE], tokenizer=make_tokenizer(), method="wanda", compression=0.25, seq_len=16, nsamples=32
    )
    assert {row.name for row in small.report.layers} >= {f"model.layers.0.mlp.experts.{i}.0" for i in range(4)}
    with pytest.raises(InputError, match=r"gets other tokens .* use `target='block'`"):
        vitoats.compress(
            model, [PROSE], tokenizer=make_tokenizer(), method="oats-h", allocation="uniform", seq_len=16, nsamples=32
        )
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # all tokens reach the first expert
    with pytest.raises(InputError, match=r"no token reached model.layers.0.mlp.experts.1.0"):
        vitoats.compress(model, [PROSE], tokenizer=make_tokenizer(), method="wanda", seq_len=16, nsamples=32)


def test_an_encoder_is_refused():
    config = transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=40)  # fmt: skip
    with pytest.raises(InputError, match=r"is an encoder, whose tokens see those after them"):
        adapt(transformers.BertLMHeadModel(config).eval(), INPUTS)


def test_a_model_without_a_list_of_blocks_is_refused():
    model = make_model("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(InputError, match=r"no list of blocks|do not|no linear"):
        adapt(model, INPUTS)


def test_only_the_orientation_of_gpt2s_layers_changes():
    model = make_model("gpt2")
    before = copy.deepcopy(model.state_dict())
    adapt(model, INPUTS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    torch.testing.assert_close(after["transformer.h.0.mlp.c_fc.weight"], before["transformer.h.0.mlp.c_fc.weight"].T)


def test_a_block_gives_hidden_states_alone():
    model = make_model("gpt2")
    seen = []
    adapter = adapt(model, INPUTS)
    with watch_outputs({"": adapter.blocks[0].module}, lambda _n, _x, y: seen.append(y)), torch.inference_mode():
        hidden = adapter.blocks[0].run(adapter.first_hidden(INPUTS.noise(1)))
    assert torch.equal(hidden, seen[0][0] if isinstance(seen[0], tuple) else seen[0])


def test_a_model_whose_outputs_are_all_zero_is_a_chain_of_blocks_too():
    model = make_model("llama")
    for parameter in model.parameters():
        parameter.zero_()
    assert len(adapt(model, INPUTS).blocks) == 2
