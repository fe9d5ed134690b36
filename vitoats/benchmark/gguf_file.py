"""A Llama as a GGUF file with 8-bit weights (Q8_0), for llama.cpp; without a tokenizer, since only speed is measured there."""

from pathlib import Path
from typing import Any

import numpy as np

TENSORS = {  # of a block, by transformers' name
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCKS = "model.layers."


def write_gguf(model: Any, path: Path) -> None:
    """Writes a ``LlamaForCausalLM``."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("none")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if name.endswith("q_proj.weight"):
            array = _interleaved(array, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            array = _interleaved(array, config.num_key_value_heads)
        if array.ndim == 1:
            writer.add_tensor(_gguf_name(name), array)
        else:
            q8 = GGMLQuantizationType.Q8_0
            writer.add_tensor(_gguf_name(name), quantize(array, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    layer = name.removesuffix(".weight")
    if not layer.startswith(BLOCKS):
        return f"{OTHERS[layer]}.weight"
    number, _, inner = layer.removeprefix(BLOCKS).partition(".")
    return f"blk.{number}.{TENSORS[inner]}.weight"


def _interleaved(W: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order, which turns neighbours together, not halves of a head."""
    n, k = W.shape
    return W.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)
