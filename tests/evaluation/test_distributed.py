"""Proves that processes which share an evaluation count what one process counts: every image once, in the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import write_image
from vitoats.cli.common import run
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.common import ranks
from vitoats.evaluation.accuracy import Accuracy
from vitoats.evaluation.distributed import share, total

ROOT = Path(__file__).parent.parent.parent
SAME = ("top1", "top5", "n_images", "n_correct1", "n_correct5", "n_skipped", "img_size", "param_count")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (1, 4), (16, 4), (17, 4), (61, 16), (5, 100)])
def test_shares_are_the_batches_of_one_process(size, n, batch_size, monkeypatch):
    order = torch.randperm(n).tolist()
    whole = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    monkeypatch.setattr(ranks, "size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(share(order, batch_size))
    assert sorted(batch for share in shares for batch in share) == sorted(whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_the_counts_are_ones_own():
    own = Accuracy(3, 2, 3, predictions=[1], seconds=0.5)
    assert total(own) == own


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """53 images in 4 classes, and 3 files that are none."""
    root = tmp_path_factory.mktemp("shared")
    for i in range(53):
        write_image(root / f"class{i % 4}" / f"{i}.png", i)
    for i in (7, 20, 41):
        (root / f"class{i % 4}" / f"{i}x.png").write_bytes(b"noise")
    return root


def both(capsys, flags, processes, batch_size):
    """The results of one process and of several that torchrun starts, with all that those wrote on stdout."""
    flags = [*map(str, flags), "--threads", "1", "--workers", "0", "--batch-size", str(batch_size)]
    assert run(eval_imagenet, [*flags, "--quiet"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    started = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "tools" / "eval_imagenet.py"), *flags],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert started.returncode == 0, started.stderr
    return alone, json.loads(started.stdout.splitlines()[-1]), started.stdout


def test_two_processes_count_as_one(tiny_folder, images, tmp_path, capsys):
    flags = ["-m", f"local-dir:{tiny_folder}", "--data-dir", images, "--results-file", tmp_path / "r.json"]
    alone, shared, stdout = both(capsys, flags, 2, 5)
    assert (alone["n_images"], alone["n_skipped"]) == (53, 3)
    assert {k: shared[k] for k in SAME} == {k: alone[k] for k in SAME}
    assert (alone["processes"], shared["processes"]) == (1, 2)
    assert len(stdout.splitlines()) == 1  # the first process alone speaks
    assert json.loads((tmp_path / "r.json").read_text()) == shared


@pytest.mark.slow
def test_an_onnx_file_in_more_processes_than_batches(tiny_folder, images, tmp_path, capsys):
    exported = tmp_path / "m.onnx"
    assert run(export_onnx, ["--model", f"local-dir:{tiny_folder}", "-o", str(exported), "--quiet"]) == 0
    alone, shared, _ = both(capsys, ["-m", exported, "--data-dir", images], processes=4, batch_size=20)
    assert {k: shared[k] for k in SAME} == {k: alone[k] for k in SAME}
