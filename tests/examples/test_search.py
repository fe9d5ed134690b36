"""The example of a search: features of an exported file, an index, and what it finds."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.examples.test_serve import EXAMPLES, exported, module  # noqa: F401  (exported is a fixture)

pytest.importorskip("faiss")
search = module("search/search.py")


def test_an_image_finds_itself_first(exported, tmp_path):  # noqa: F811
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    script, index = EXAMPLES / "search" / "search.py", tmp_path / "photos.faiss"
    argv = [exported, "--index", index, "--add", tmp_path / "photos", "--query", tmp_path / "photos" / "7.png"]
    done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"1.000 {tmp_path / 'photos' / '7.png'}"


def test_recall_counts_common_neighbours():
    """All of them with the same features; about one in ten of a hundred with features that have nothing to do with them."""
    random = np.random.default_rng(0)
    drawn = random.standard_normal((2, 101, 30), np.float32)
    dense, other = drawn / np.linalg.norm(drawn, axis=2, keepdims=True)
    assert search.recall(dense, dense) == 1
    assert 0.05 < search.recall(other, dense) < 0.2
