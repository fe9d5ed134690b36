"""Language models: a sample of generated text, and the loss of each token of a passage, dense against compressed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitoats.loading.loaded_text import LoadedLanguageModel
from vitoats.report.page.document import Chart, Missing, Part, Passage, Quotes, Section, Table, number

PASSAGE, PROMPT, NEW = 160, 24, 48  # tokens of the passage, of the prompt at its beginning, and of its continuation
WORST = 20  # tokens in the table of the largest differences
FULL = 3.0  # nats of a difference that has the full colour
NAMES = ("dense", "compressed")


@torch.inference_mode()
def token_losses(model: Any, tokens: Tensor) -> Tensor:
    """The loss in nats of each token but the first, [n - 1], of tokens [n] given those before it."""
    logits = model(input_ids=tokens[None]).logits[0, :-1].float()
    return F.cross_entropy(logits, tokens[1:], reduction="none")


@torch.inference_mode()
def continuation(model: Any, tokens: Tensor, new: int = NEW) -> Tensor:
    """The tokens that a model adds to tokens [n], always the most probable one; it stops at its end-of-text token.

    Settings for generation that come with the model are not used.
    """
    from transformers import GenerationConfig

    end = model.config.eos_token_id
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=end, pad_token_id=0)
    found = model.generate(tokens[None], attention_mask=torch.ones_like(tokens[None]), generation_config=settings)
    return found[0, len(tokens) :]


def language_section(
    compressed: LoadedLanguageModel, dense: LoadedLanguageModel | None, tokens: Tensor, source: str
) -> Section:
    """The section for the first tokens [n] of a text; ``source`` names it."""
    models = {NAMES[1]: compressed.model} if dense is None else {NAMES[0]: dense.model, NAMES[1]: compressed.model}
    passage, tokenizer = tokens[:PASSAGE], compressed.need_tokenizer()
    words = [tokenizer.decode([int(token)]) for token in passage]
    losses = {name: token_losses(model, passage).double() for name, model in models.items()}
    prompt = passage[:PROMPT]
    quotes = [(f"{name} continues", tokenizer.decode(continuation(model, prompt)).strip()) for name, model in models.items()]
    parts: list[Part] = [
        Quotes("Generated text, always the most probable token", [("prompt", tokenizer.decode(prompt)), *quotes])
    ]
    parts += [passage_of(words, losses), loss_chart(words, losses)]
    if dense is None:
        parts.append(Missing("text and losses of the dense model", "add --dense MODEL"))
    lead = f"The same passage through both models. The loss of a token is what its probability costs, in nats. Text: {source}."
    return Section("text", "Text", lead, parts)


def passage_of(words: Sequence[str], losses: Mapping[str, Tensor]) -> Passage:
    """The passage, coloured by the difference of the losses, or by the loss itself if there is no dense model."""
    if len(losses) == 2:
        shown = losses[NAMES[1]] - losses[NAMES[0]]
        legend = (
            f"Orange: less probable after compression; blue: more probable. Full colour from {FULL:g} nats. "
            f"Mean loss: {losses[NAMES[0]].mean():.3f} dense, {losses[NAMES[1]].mean():.3f} compressed."
        )
    else:
        shown = losses[NAMES[1]] / 3
        legend = f"Orange: improbable; full colour from {3 * FULL:g} nats. Mean loss: {losses[NAMES[1]].mean():.3f}."
    tokens = [(words[0], 0.0, "the first token has no loss")]
    for i, word in enumerate(words[1:]):
        said = ", ".join(f"{name} {values[i]:.2f}" for name, values in losses.items())
        tokens.append((word, float((shown[i] / FULL).clamp(-1, 1)), f"loss: {said}"))
    return Passage("Loss of each token", tokens, legend)


def loss_chart(words: Sequence[str], losses: Mapping[str, Tensor]) -> Chart:
    """The loss along the passage."""
    values = [
        {"position": i + 1, "token": words[i + 1], "loss": float(loss), "model": name}
        for name, of_all in losses.items()
        for i, loss in enumerate(of_all)
    ]
    spec = {
        "data": {"values": values},
        "mark": {"type": "line", "strokeWidth": 1.5, "point": {"size": 60, "opacity": 0}},
        "encoding": {
            "x": {"field": "position", "type": "quantitative", "title": "token", "scale": {"nice": False}},
            "y": {"field": "loss", "type": "quantitative", "title": "loss (nats)"},
            "color": {"field": "model", "type": "nominal", "title": None, "sort": list(NAMES)},
            "strokeDash": {"field": "model", "type": "nominal", "legend": None, "sort": list(NAMES)},
            "tooltip": [
                {"field": "token", "type": "nominal"},
                {"field": "model", "type": "nominal"},
                {"field": "loss", "type": "quantitative", "format": ".3f"},
            ],
        },
    }
    names = list(losses)
    rise = losses[names[-1]] - losses[names[0]] if len(names) == 2 else losses[names[-1]]
    order = rise.argsort(descending=True)[:WORST].tolist()
    rows = [(words[i + 1], f"{i + 1}", *(number(float(losses[name][i]), ".3f") for name in names)) for i in order]
    means = ", ".join(f"{name} {of_all.mean():.3f} nats" for name, of_all in losses.items())
    table = Table("The tokens whose loss rose most", ("token", "position", *names), rows)
    return Chart("Loss along the passage", f"Loss of {len(words) - 1} tokens. In the mean: {means}.", spec, table)
