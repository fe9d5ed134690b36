"""Tiny language models with random weights, one for each family, and text for them."""

import pytest
import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before transformers, which imports torchvision)

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra lm)")

VOCABULARY, LENGTH = 96, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 4},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "phi3": GROUPED,
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 4},
    "gemma3_text": {**GROUPED, "head_dim": 8, "sliding_window": 4},
    "gpt_neox": SIZES,
    "gpt2": GPT2,
    "opt": {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 24},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4},
}
FUSED_EXPERTS = {"mixtral": {**GROUPED, "num_local_experts": 4}}


def make_model(kind, **changes):
    """A model in eval mode, the same weights every time."""
    sizes = (CONFIGS | FUSED_EXPERTS).get(kind, SIZES)
    config = transformers.AutoConfig.for_model(kind, **(sizes | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # the usual initial weights hardly mix tokens
            if parameter.ndim == 2:
                parameter.data *= 5
    return model.eval().requires_grad_(False)


def make_tokenizer():
    """A tokenizer with a token for each printable character, and the tokens of the beginning and the end of a text."""
    tokenizers = pytest.importorskip("tokenizers")
    known = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {chr(code): code - 28 for code in range(32, 124)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_folder(folder, kind="llama", **changes):
    """A transformers folder with a tiny model and its tokenizer."""
    make_model(kind, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


PROSE = "\n".join(
    f"The {i} ships of the line sailed past island {i * i}, and {i + 3} of them came back in winter." for i in range(40)
)
