"""A Llama of any size with random weights, for benchmarks: speed depends on shapes."""

from dataclasses import dataclass

import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before transformers, which imports torchvision)
from vitoats.loading.language_models import need_transformers
from vitoats.loading.loaded_text import LoadedLanguageModel, Packing

POSITIONS = 2048


@dataclass(frozen=True)
class LlamaSize:
    """The sizes of a Llama; the default has 1.1 billion parameters."""

    hidden_size: int = 2048
    layers: int = 22
    intermediate_size: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocab_size: int = 32_000


def generated_model(size: LlamaSize, seed: int) -> LoadedLanguageModel:
    """Makes the model, with a tokenizer that knows one word."""
    need_transformers()
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate_size,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab_size,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"word": 0}, unk_token="word")), unk_token="word")
    return LoadedLanguageModel("generated", model, tokenizer, Packing(POSITIONS), "random weights")
