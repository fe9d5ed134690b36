"""One of the processes that the benchmark ``busy`` compares.

python -m vitoats.cli.benchmark.busy_process inference FILE THREADS BATCH RUNS
python -m vitoats.cli.benchmark.busy_process compression MODEL THREADS BATCH METHOD ITERATIONS IMAGES
"""

import sys
from collections.abc import Callable

from vitoats.benchmark.busy import work_when_told

COMPRESSION = 0.5
SEED = 0


def inference_work(file: str, threads: str, batch: str, runs: str) -> Callable[[], object]:
    """Runs an ONNX file on noise."""
    import numpy as np

    from vitoats.runtime.inference import image_shape, inference, session

    opened = session(file, int(threads))
    images = np.random.default_rng(SEED).standard_normal((int(batch), *image_shape(opened)), np.float32)
    call = inference(opened, images)
    call()
    return lambda: [call() for _ in range(int(runs))]


def compression_work(model: str, threads: str, batch: str, method: str, iterations: str, n_images: str) -> Callable[[], object]:
    """Compresses a model on noise images; with random weights, if its own are unavailable."""
    from vitoats.api import compress
    from vitoats.benchmark.weights import load_or_randomise
    from vitoats.loading.source import ModelSource

    loaded, _ = load_or_randomise(ModelSource(name=model))
    noise = loaded.inputs.noise(int(n_images), SEED)
    return lambda: compress(
        loaded.timm_model,
        noise,
        method=method,
        compression=COMPRESSION,
        iterations=int(iterations),
        allocation="uniform",
        calibration_mix="none",
        img_size=loaded.inputs.img_size,
        batch_size=int(batch),
        threads=int(threads),
    )


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    work_when_told(compression_work(*arguments) if name == "compression" else inference_work(*arguments))
