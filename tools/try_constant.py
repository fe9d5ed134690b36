"""Shows why a constant of OATS-H has its value: compresses the embedded model with several values of it.

    python tools/try_constant.py RIDGE 0.001 0.01 0.1
    python tools/try_constant.py penalty slow alps

For a constant, prints the relative error of the features on held-out images of the user's kind (own) and on synthetic ones, at
60 %, calibrated on own images only. For ``penalty``, a name of the table PENALTIES in vitoats/methods/admm.py, prints the layer
error of the solver alone, as tools/benchmark.py layers does.
"""

import argparse
import math
import time

from vitoats.allocation import sensitivity
from vitoats.benchmark.layers import compare_methods, geometric_means
from vitoats.benchmark.matrices import dense_matrices
from vitoats.calibration import targets
from vitoats.compression import settings
from vitoats.compression.run import run
from vitoats.data.images import SAMPLE, calibration_batches, open_images
from vitoats.loading.load import load_model
from vitoats.loading.names import EMBEDDED
from vitoats.methods.admm import PENALTIES
from vitoats.methods.oats_h import OATSHConfig

MODULES = {"RIDGE": targets, "FIRST_BLOCK_SHARE": sensitivity, "CLOSED_DOMAIN_DAMPING": settings}
COMPRESSION, RANK_RATIO, BLOCKS = 0.6, 0.25, [3, 8]


def try_constant(name: str, value: float, nsamples: int) -> str:
    """The feature errors of a compression with this value."""
    setattr(MODULES[name], name, value)
    fixed = {"compression": COMPRESSION, "rank_ratio": RANK_RATIO, "calibration_mix": "none", "threads": 1}
    errors = run(settings.make_job(EMBEDDED, nsamples=nsamples, **fixed)).about["feature_error"]
    return ", ".join(f"{kind} {error:.4f}" for kind, error in errors.items())


def try_penalty(value: str, nsamples: int) -> str:
    """The geometric mean of the layer errors, and the time."""
    loaded = load_model(EMBEDDED)
    dataset = open_images(SAMPLE, "train", loaded.preprocessing.transform())
    matrices = dense_matrices(loaded, calibration_batches(dataset, nsamples, 42, 64, 0), nsamples, 64, BLOCKS, "full")
    start = time.process_time()
    config = OATSHConfig(compression=COMPRESSION, rank_ratio=RANK_RATIO, penalty=value)
    error = geometric_means(compare_methods(matrices, {"oats-h": config}))["oats-h"]
    return f"layer error {error:.5f} in {time.process_time() - start:.0f} CPU seconds"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=[*MODULES, "penalty"])
    parser.add_argument("values", nargs="+")
    parser.add_argument("--nsamples", type=int, default=512, help="calibration images")
    args = parser.parse_args()
    if args.name == "penalty" and (unknown := [value for value in args.values if value not in PENALTIES]):
        parser.error(f"there is no penalty {unknown[0]}: use {', '.join(PENALTIES)}")
    if args.name != "penalty" and not all(_is_number(value) for value in args.values):
        parser.error(f"the values of {args.name} are numbers")
    for value in args.values:
        if args.name == "penalty":
            found = try_penalty(value, args.nsamples)
        else:
            found = try_constant(args.name, float(value), args.nsamples)
        print(f"{args.name} {value}: {found}", flush=True)


if __name__ == "__main__":
    main()
