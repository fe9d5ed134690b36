"""Creates the image sample embedded in the package from the files of Fashion-MNIST (Zalando, MIT).

    python tools/make_sample.py /usr/share/datasets/fashion-mnist vitoats/data/fashion_mnist_sample.npz

It holds 512 training images for calibration and 2,000 test images, drawn with a fixed seed. The matching head is trained by
tools/train_linear_probe.py, on training images only.
"""

import sys
from pathlib import Path

import numpy as np

from vitoats.data.images import IDX_FILES, read_idx

SIZES = {"train": 512, "test": 2000}


def main(source: Path, target: Path) -> None:
    random = np.random.RandomState(0)
    arrays = {}
    for split, prefix in IDX_FILES.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", header=16, shape=(28, 28))
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", header=8)
        chosen = random.permutation(len(images))[: SIZES[split]]
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
    np.savez_compressed(target, **arrays)
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[2]).parent.is_dir():
        sys.exit(f"give the folder of the files, and a file to write in a folder that exists:\n{__doc__}")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
