"""Whether compressed features find what the dense ones find: recall@10 on the embedded sample of Fashion-MNIST.

    python examples/search/recall.py dense.onnx int8.onnx small.onnx --features Concat.3.y

Takes files with a head: --features names the value that the head reads. The first file is the reference; each image is a query
among all others.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from search import Model, recall

sys.path.append(str(Path(__file__).parent.parent / "serve"))
from load_test import sample


def without_head(file: str, features: str, folder: str) -> Path:
    """Writes the file with another output."""
    model = onnx.load(file)
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(features, onnx.TensorProto.FLOAT, None))
    path = Path(folder) / Path(file).name
    onnx.save(model, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="exported .onnx files, the dense one first")
    parser.add_argument("--features", required=True, metavar="NAME", help="the value that the head reads")
    args = parser.parse_args()
    images, dense = sample(512), None
    print("| file | recall@10 |\n|---|---|")
    for file in args.files:
        with tempfile.TemporaryDirectory() as folder:
            model = Model(str(without_head(file, args.features, folder)))
            found = np.stack([model(image).reshape(-1) for image in images])
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        dense = found if dense is None else dense
        print(f"| {Path(file).name} | {100 * recall(found, dense):.1f} % |", flush=True)


if __name__ == "__main__":
    main()
