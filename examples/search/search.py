"""Finds the images of a folder that look like a given one, by the features of an exported backbone.

    vitoats export_onnx runs/vitb14 -o features.onnx                    (without --head: features)
    python examples/search/search.py features.onnx --index photos.faiss --add PHOTOS
    python examples/search/search.py features.onnx --index photos.faiss --query cat.jpg

The index is FAISS's IndexFlatIP: exact cosine similarity; for millions of images take an approximate one. The names of its
images are in a text file beside it.
"""

import argparse
import sys
from pathlib import Path

import faiss
import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "serve"))
from service import Model

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def features(model: Model, files: list[Path]) -> np.ndarray:
    """The features [n, width] of images, of length 1."""
    found = np.stack([model(file.read_bytes()).reshape(-1) for file in files])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def build(found: np.ndarray) -> faiss.Index:
    """An index of features [n, width] of length 1."""
    index = faiss.IndexFlatIP(found.shape[1])
    index.add(found)
    return index


def recall(found: np.ndarray, dense: np.ndarray, k: int = 10) -> float:
    """The share of the dense model's k nearest neighbours that an index of other features finds, themselves apart."""
    similar = dense @ dense.T
    np.fill_diagonal(similar, -np.inf)
    expected = np.argsort(-similar, axis=1)[:, :k]
    _, keys = build(found).search(found, k + 1)
    hits = [len(set(wanted) & (set(row.tolist()) - {i})) for i, (row, wanted) in enumerate(zip(keys, expected, strict=True))]
    return sum(hits) / expected.size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="an exported .onnx file")
    parser.add_argument("--index", type=Path, required=True, metavar="FILE")
    parser.add_argument("--add", type=Path, metavar="DIR", help="write an index of the images in this folder")
    parser.add_argument("--query", type=Path, metavar="IMAGE", help="print the images most like this one")
    args = parser.parse_args()
    model, names = Model(args.model), args.index.with_suffix(".txt")
    if args.add:
        files = sorted(file for file in args.add.rglob("*") if file.suffix.lower() in ENDINGS)
        faiss.write_index(build(features(model, files)), str(args.index))
        names.write_text("".join(f"{file}\n" for file in files))
    if args.query:
        similar, rows = faiss.read_index(str(args.index)).search(features(model, [args.query]), 10)
        files_of = names.read_text().splitlines()
        for cosine, row in zip(similar[0], rows[0], strict=True):
            if row >= 0:  # -1 where there are fewer images
                print(f"{cosine:.3f} {files_of[row]}")


if __name__ == "__main__":
    main()
