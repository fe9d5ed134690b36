"""Times language models: the prompt at once (prefill), then token by token. The variants take turns.

Each turn opens a variant, runs a little of both unmeasured, measures, and closes it: so several large models need not fit in
memory together, and the threads of one do not disturb the next.
"""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitoats.benchmark.decode_files import DENSE, GGUF, ORT_INT8, megabytes
from vitoats.benchmark.engines import Engine, LlamaCppEngine, OnnxEngine
from vitoats.common.progress import StageProgress
from vitoats.runtime.decoder import Decoder

WARM_PROMPT, WARM_STEPS = 8, 2  # tokens before each measurement


@dataclass(frozen=True)
class DecodeTimes:
    """The speed of a variant with one text at a time.

    Attributes:
        threads: threads of the runtime.
        variant: its name.
        prefill_tokens_per_second: for the prompt; the median of the rounds.
        decode_tokens_per_second: for one token after another, behind the prompt; from the median time of a step.
        decode_ms: this median, in milliseconds.
        speedup: of decoding, over ``dense``.
        speedup_int8: of decoding, over ``ort-int8``; None without it.
        file_mb: size of its weights in megabytes.
    """

    threads: int
    variant: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_ms: float
    speedup: float
    speedup_int8: float | None
    file_mb: float


def compare_decoders(
    variants: Mapping[str, Path],
    threads: Sequence[int],
    prompt: int,
    steps: int,
    rounds: int,
    seed: int = 0,
    progress: StageProgress = lambda *_: None,
) -> list[DecodeTimes]:
    """Times variants of a model on random tokens.

    Args:
        variants: their folders by name; ``dense`` is among them.
        threads: numbers of CPU threads.
        prompt: tokens of the prompt.
        steps: tokens after it.
        rounds: turns of each variant.
        seed: of the tokens.
        progress: called before each turn.

    Returns:
        rows, ordered by threads, then variant.
    """
    vocab_size = Decoder(variants[DENSE], 1).vocab_size
    tokens = np.random.default_rng(seed).integers(vocab_size, size=prompt + steps)
    rows, done, turns = [], 0, len(threads) * rounds * len(variants)
    for count in threads:
        prefill: dict[str, list[float]] = {name: [] for name in variants}
        decode: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, folder in variants.items():
                progress(done, turns, f"{name}, {count} threads")
                done += 1
                engine = _open(folder, len(tokens), count, vocab_size)
                _measure(engine, tokens, prompt, prefill[name], decode[name])
                engine.close()
                gc.collect()
        seconds = {name: statistics.median(times) for name, times in decode.items()}
        rows += [
            DecodeTimes(
                threads=count,
                variant=name,
                prefill_tokens_per_second=round(prompt / statistics.median(prefill[name]), 1),
                decode_tokens_per_second=round(1 / seconds[name], 2),
                decode_ms=round(1000 * seconds[name], 3),
                speedup=round(seconds[DENSE] / seconds[name], 3),
                speedup_int8=round(seconds[ORT_INT8] / seconds[name], 3) if ORT_INT8 in seconds else None,
                file_mb=round(megabytes(folder), 1),
            )
            for name, folder in variants.items()
        ]
    return rows


def _open(folder: Path, length: int, threads: int, vocab_size: int) -> Engine:
    if (folder / GGUF).is_file():
        return LlamaCppEngine(folder / GGUF, length, threads, vocab_size)
    return OnnxEngine(folder, length, threads)


def _measure(engine: Engine, tokens: np.ndarray, prompt: int, prefill: list[float], decode: list[float]) -> None:
    """Appends the seconds of the prompt, and of each token after it."""
    engine.extend(tokens[: min(WARM_PROMPT, prompt)])
    for token in tokens[-WARM_STEPS:]:
        engine.extend(np.array([token]))
    engine.start()
    start = time.perf_counter()
    engine.extend(tokens[:prompt])
    prefill.append(time.perf_counter() - start)
    for token in tokens[prompt:]:
        start = time.perf_counter()
        engine.extend(np.array([token]))
        decode.append(time.perf_counter() - start)
