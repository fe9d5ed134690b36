"""A small comparison, its runs, and what its folder holds."""

import numpy as np

from vitoats.cli import common
from vitoats.cli.compare import main as compare

METHODS = "wanda,low=oats,svd"
RUNS = ["wanda-own-0.3", "wanda-own-0.5", "wanda-2of4", "low-own-0.3", "low-own-0.5", "low-2of4", "svd-own-0.3", "svd-own-0.5"]


def flags(model, data, output, methods=METHODS):
    """A small comparison."""
    return (
        f"--model local-dir:{model} --data-dir {data} --methods {methods} --compressions 0.3,0.5 --patterns own,2:4 "
        f"--nsamples 16 --num-samples 20 --batch-size 8 --threads 1 --quiet --output {output}"
    ).split() + [f"--options={options}" for options in ("low:rank_ratio=0.25,iterations=3",) if "low" in methods]


def one_run(model, data, output, *more):
    """A comparison of one run."""
    few = f"--model local-dir:{model} --data-dir {data} --methods wanda --nsamples 16 --threads 1 --quiet --output {output}"
    return [*few.split(), *map(str, more)]


def per_image(folder, name):
    with np.load(folder / "rows" / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def row_of(result, name):
    """The row of a run by its name in files."""
    names = ["dense", "int8", *RUNS]
    return result["rows"][names.index(name)]


def refused(capsys, argv, status=2):
    """Runs a comparison that fails; gives its last line."""
    capsys.readouterr()
    assert common.run(compare, [str(a) for a in argv]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    return last
