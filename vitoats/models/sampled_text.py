"""Text that a causal language model samples, to calibrate it on beside the user's own text.

Texts of one kind leave many directions of a layer's inputs nearly empty, and weights that are fitted to them are inaccurate on
others. A model's samples are of all the kinds that it was trained on (Williams, Chrysostomou and Aletras, "Self-calibration for
language model quantization and pruning", arXiv 2410.17170).
"""

from collections.abc import Iterator
from typing import Any

import torch

AT_A_TIME = 16  # texts; their keys and values are in memory


def sampled_texts(model: Any, tokenizer: Any, n: int, length: int, seed: int) -> Iterator[list[str]]:
    """Yields texts, a few at a time, each sampled at temperature 1 from the token that begins a text.

    A text goes on behind an end-of-text token, with another document. The same seed gives the same texts on the same kind of
    device.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        n: number of texts.
        length: tokens of each.
        seed: seed of the draws.
    """
    first = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)
    device = model.device
    for start in range(0, n, AT_A_TIME):
        tokens = torch.full((min(AT_A_TIME, n - start), 1), first, device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(seed + start)
            drawn = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=length,
                eos_token_id=None,
                pad_token_id=first,
            )
        yield [tokenizer.decode(text[1:]) for text in drawn]
