"""Proves that heads are trained as DINOv2 trains them, picked without the test images, on the features that heads see.

torch's own SGD and cosine schedule are the reference for the many heads at once, plain loops for the nearest neighbours.
"""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from tests.conftest import TINY
from vitoats.cli.common import run
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.cli.train_linear_probe import main as train_linear_probe
from vitoats.common.errors import RunError
from vitoats.common.files import hold
from vitoats.evaluation import features, probe
from vitoats.evaluation.features import Features, extract, tokens_of
from vitoats.evaluation.knn import knn_predict
from vitoats.evaluation.probe import Candidate, Schedule, pick, train_again, train_heads, try_heads
from vitoats.models import heads

import timm  # isort: skip
from timm.models import save_for_hf  # isort: skip


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 0, "depth": 5}).eval()


# ---- features


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("patch_mean", [False, True])
def test_features_are_what_a_head_sees(backbone, layers, patch_mean):
    images = torch.randn(7, 3, 32, 32)
    stream = [(images[:4], torch.arange(4)), (images[4:], torch.arange(4, 7))]
    found = extract(tokens_of(backbone), stream)
    with torch.inference_mode():
        seen = heads.features(backbone, images, layers, patch_mean)
    torch.testing.assert_close(found.select(layers, patch_mean), seen)
    assert found.labels.tolist() == list(range(7))
    assert found.rows(torch.tensor([5, 2])).labels.tolist() == [5, 2]


# ---- training


def blobs(n, d, classes, seed=0, spread=0.7, layers=1):
    """Features of classes that lie apart, as tokens [n, layers + 1, d]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, layers + 1, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return Features(centres[labels] + spread * torch.randn(n, layers + 1, d, generator=generator), labels)


def test_heads_are_those_of_torchs_sgd(monkeypatch):
    monkeypatch.setattr(probe, "FEWEST_STEPS", 30)
    schedule = Schedule(learning_rates=(0.01, 0.1, 1.0), epochs=2, batch_size=16, seed=3)
    data = blobs(100, 12, 4)
    x, y = data.select(1, True), data.labels
    weight, bias = train_heads(x, y, 4, schedule)
    steps = schedule.steps(100)
    assert steps == 30

    generator = torch.Generator().manual_seed(3)  # the same initial weights and the same batches
    initial = 0.01 * torch.randn(3 * 4, 24, generator=generator).reshape(3, 4, 24)
    order = torch.cat([torch.randperm(100, generator=generator) for _ in range(5)])
    for i, rate in enumerate(schedule.learning_rates):
        head = torch.nn.Linear(24, 4)
        head.weight.data, head.bias.data = initial[i].clone(), torch.zeros(4)
        optimizer = torch.optim.SGD(head.parameters(), lr=rate * 16 / 256, momentum=0.9, weight_decay=0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
        for step in range(steps):
            index = order[16 * step : 16 * step + 16]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[index]), y[index]).backward()
            optimizer.step()
            scheduler.step()
        torch.testing.assert_close(weight[i], head.weight.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias[i], head.bias.data, rtol=1e-4, atol=1e-5)


def test_grid_and_pick():
    """A head for each choice of features and rate; the best on the held-out images, the loss decides between equals."""
    train, held_out = blobs(200, 6, 3, 1, layers=4), blobs(80, 6, 3, 2, layers=4)
    schedule = Schedule(learning_rates=(1e-6, 0.1))
    found = try_heads(train, held_out, 3, (1, 4), schedule)
    assert len({(c.layers, c.patch_mean, c.learning_rate) for c in found}) == len(found) == 8
    best = pick(found)
    assert best.top1 == max(c.top1 for c in found) > 90
    assert best.learning_rate == 0.1
    weight, bias = train_again(best, train, 3, schedule)
    assert weight.shape == (3, (best.layers + best.patch_mean) * 6)
    logits = held_out.select(best.layers, best.patch_mean) @ weight.T + bias
    assert probe.accuracy(logits, held_out.labels) == best.top1  # the same images give the same head


def test_pick_by_hand():
    kinds = [(50.0, 1.0), (60.0, math.nan), (60.0, 0.9), (60.0, 0.8), (60.0, math.inf), (59.0, 0.1)]
    candidates = [Candidate(1, False, float(i), top1, loss) for i, (top1, loss) in enumerate(kinds)]
    assert pick(candidates).learning_rate == 3


def test_a_head_that_diverged_is_the_last_choice():
    """Its predictions are all class 0, which may be right more often than a weak head's."""
    candidates = [Candidate(1, False, 0.0, 90.0, math.nan), Candidate(1, False, 1.0, 40.0, 2.0)]
    assert pick(candidates).learning_rate == 1


def test_where_all_heads_diverge_none_is_written():
    given = Features(1e3 * torch.randn(40, 2, 6), torch.arange(40) % 3)
    schedule = Schedule((1e38,), epochs=1)
    best = pick(try_heads(given, given, 3, [1], schedule))
    assert not math.isfinite(best.loss)
    with pytest.raises(RunError, match="give smaller `learning_rates`"):
        train_again(best, given, 3, schedule)
    with pytest.raises(RunError, match="give smaller `learning_rates`"):
        train_again(Candidate(1, False, 1e38, 50.0, 1.0), given, 3, schedule)


def test_features_that_are_not_finite_are_refused():
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    images = torch.randn(3, 3, 32, 32)
    images[1] = float("nan")
    with pytest.raises(RunError, match=r"features are not finite .* for 1 of the 3 images"):
        extract(tokens_of(model), [(images, torch.zeros(3, dtype=torch.long))])


# ---- nearest neighbours


@pytest.mark.parametrize("k", [1, 3, 20, 500])
def test_nearest_neighbours_by_loops(k):
    train, test = blobs(60, 8, 5, 3, spread=2.0), blobs(40, 8, 5, 4, spread=2.0)
    x, q = train.select(1, False).double(), test.select(1, False).double()
    expected = []
    for one in q:
        similar = [(float(one @ other / one.norm() / other.norm()), int(c)) for other, c in zip(x, train.labels, strict=True)]
        votes = [0.0] * 5
        for s, c in sorted(similar, reverse=True)[:k]:
            votes[c] += math.exp(s / 0.07)
        expected.append(votes.index(max(votes)))
    assert knn_predict(x.float(), train.labels, q.float(), k, chunk=7).tolist() == expected


# ---- the command


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A backbone, and images of 3 colours with noise: 40 a class to train on, 10 a class to test on."""
    root = tmp_path_factory.mktemp("probe")
    torch.manual_seed(0)
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 0, "depth": 4}), str(root / "b"))
    random = np.random.default_rng(0)
    for split, n in (("train", 40), ("val", 10)):
        for c in range(3):
            for i in range(n):
                pixels = random.integers(0, 160, (36, 36, 3))
                pixels[..., c] += 60
                path = root / "data" / split / f"class{c + 9}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


FAST = ("--learning-rates", "0.001", "0.1", "1")


def call(capsys, main, *argv, status=0):
    found = run(main, [*map(str, argv), "--threads", "1", "--quiet"])
    out, err = capsys.readouterr()
    assert found == status, err
    return json.loads(out.splitlines()[-1]) if status == 0 else err.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(places):
    """A head that the command trained."""
    flags = ["--model", f"local-dir:{places / 'b'}", "--data-dir", str(places / "data"), *FAST, "--quiet"]
    out = ["-o", str(places / "h.safetensors"), "--results-file", str(places / "r.json")]
    assert run(train_linear_probe, [*flags, *out, "--cache", str(places / "cache")]) == 0
    return places / "h.safetensors", json.loads((places / "r.json").read_text())


def test_the_head_evaluates_as_the_command_said(places, trained, capsys):
    head, said = trained
    assert (said["n_train"], said["n_held_out"], said["n_images"], said["n_heads"]) == (120, 12, 30, 12)
    assert said["top1"] > 60  # guessing gives 33
    found = call(
        capsys, eval_imagenet, "-m", f"local-dir:{places / 'b'}", "--head", head, "--data-dir", places / "data", "-j", "0"
    )
    assert (found["top1"], found["n_images"]) == (said["top1"], 30)


def test_the_file_says_what_it_was_made_for(places, trained):
    head, said = trained
    with safetensors.safe_open(str(head), "pt") as file:
        about = json.loads(file.metadata()["vitoats_head"])
        assert set(file.keys()) == {"weight", "bias"}
    assert about == {
        "backbone": f"local-dir:{places / 'b'}",
        "img_size": 32,
        "layers": said["layers"],
        "classes": ["class9", "class10", "class11"],
        "patch_mean": said["patch_mean"],
    }


def test_the_test_images_do_not_pick(places, trained, tmp_path, capsys):
    """With test labels turned round the same head comes out."""
    shutil.copytree(places / "data", tmp_path / "data")
    (tmp_path / "data" / "val" / "class9").rename(tmp_path / "data" / "val" / "x")
    (tmp_path / "data" / "val" / "class11").rename(tmp_path / "data" / "val" / "class9")
    (tmp_path / "data" / "val" / "x").rename(tmp_path / "data" / "val" / "class11")
    out = ("-o", tmp_path / "h.safetensors")
    said = call(capsys, train_linear_probe, "-m", f"local-dir:{places / 'b'}", "--data-dir", tmp_path / "data", *FAST, *out)
    assert said["top1"] < 50 < trained[1]["top1"]
    assert (said["layers"], said["learning_rate"]) == (trained[1]["layers"], trained[1]["learning_rate"])
    assert (tmp_path / "h.safetensors").read_bytes() == trained[0].read_bytes()


def test_features_are_computed_once(places, trained, tmp_path, capsys, monkeypatch):
    head, said = trained
    flags = ("-m", f"local-dir:{places / 'b'}", "--data-dir", places / "data", "--cache", places / "cache")

    def never(*_):
        raise AssertionError("features were computed again")

    monkeypatch.setattr(features, "extract", never)
    again = call(capsys, train_linear_probe, *flags, *FAST, "-o", tmp_path / "h.safetensors")
    assert again["top1"] == said["top1"]
    assert (tmp_path / "h.safetensors").read_bytes() == head.read_bytes()
    for other in (["--seed", "5"], ["--nsamples", "50"], ["--crop-mode", "squash"]):
        assert "computed again" in call(capsys, train_linear_probe, *flags, *other, "-o", tmp_path / "x.safetensors", status=1)


def test_a_damaged_cache_is_computed_again(places, trained, tmp_path, capsys):
    shutil.copytree(places / "cache", tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    flags = ("-m", f"local-dir:{places / 'b'}", "--data-dir", places / "data", "--cache", tmp_path / "cache")
    assert call(capsys, train_linear_probe, *flags, *FAST, "-o", tmp_path / "h.safetensors")["top1"] == trained[1]["top1"]


def test_classes_go_by_name(places, trained, tmp_path, capsys):
    """A head that knows its classes is right on some of them, and refused on others; as an ONNX file too."""
    head, _ = trained
    model = ("-m", f"local-dir:{places / 'b'}", "--head", head)
    shutil.copytree(places / "data" / "val", tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "class9")
    whole = call(capsys, eval_imagenet, *model, places / "data", "-j", "0")
    some = call(capsys, eval_imagenet, *model, tmp_path / "some", "-j", "0")
    alone = [call(capsys, eval_imagenet, *model, only(places, tmp_path, c), "-j", "0") for c in (9, 10, 11)]
    assert sum(one["n_correct1"] for one in alone) == whole["n_correct1"]
    assert some["n_correct1"] == alone[1]["n_correct1"] + alone[2]["n_correct1"]
    assert run(export_onnx, [*map(str, model), "-o", str(tmp_path / "m.onnx"), "--quiet"]) == 0
    capsys.readouterr()
    exported = call(capsys, eval_imagenet, "-m", tmp_path / "m.onnx", tmp_path / "some", "-j", "0")
    assert exported["n_correct1"] == some["n_correct1"]
    (tmp_path / "some" / "class10").rename(tmp_path / "some" / "dogs")
    for which in (model, ("-m", tmp_path / "m.onnx")):
        assert "'dogs' is none of them" in call(capsys, eval_imagenet, *which, tmp_path / "some", "-j", "0", status=2)


def only(places, tmp_path, c):
    """A folder with one class."""
    shutil.copytree(places / "data" / "val" / f"class{c}", tmp_path / f"only{c}" / f"class{c}")
    return tmp_path / f"only{c}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--held-out", "0"], "--held-out"),
        (["--held-out", "1.5"], "--held-out"),
        (["--nsamples", "1"], "--held-out"),
        (["--learning-rates", "-1"], "--learning-rates"),
    ],
)
def test_bad_settings(places, tmp_path, capsys, flags, said):
    start = ("-m", f"local-dir:{places / 'b'}", "--data-dir", places / "data", "-o", tmp_path / "h.safetensors")
    assert said in call(capsys, train_linear_probe, *start, *flags, status=2)
    assert not (tmp_path / "h.safetensors").exists()


def test_training_images_as_test_images_are_a_warning(places, tmp_path, capsys):
    flags = ["-m", f"local-dir:{places / 'b'}", "--data-dir", str(places / "data" / "train"), *FAST, "--quiet"]
    assert run(train_linear_probe, [*flags, "-o", str(tmp_path / "h.safetensors")]) == 0
    assert "no test images of its own" in capsys.readouterr().err


def test_what_would_fail_in_the_end_is_refused_before_any_feature_is_computed(places, tmp_path, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("features were computed")

    monkeypatch.setattr(features, "extract", never)
    shutil.copytree(places / "data", tmp_path / "data")
    (tmp_path / "data" / "val" / "class9").rename(tmp_path / "data" / "val" / "cats")
    flags = ("-m", f"local-dir:{places / 'b'}", "--data-dir", tmp_path / "data", "-o", tmp_path / "h.safetensors")
    assert "test images of 'cats'" in call(capsys, train_linear_probe, *flags, status=2)


def test_classes_without_test_images_are_trained_but_not_tested(places, trained, tmp_path, capsys):
    shutil.copytree(places / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "class10")
    flags = ("-m", f"local-dir:{places / 'b'}", "--data-dir", tmp_path / "data", *FAST)
    said = call(capsys, train_linear_probe, *flags, "-o", tmp_path / "h.safetensors")
    assert said["n_images"] == 20
    assert (tmp_path / "h.safetensors").read_bytes() == trained[0].read_bytes()
    found = call(capsys, eval_imagenet, *flags[:2], "--head", tmp_path / "h.safetensors", tmp_path / "data", "-j", "0")
    assert found["top1"] == said["top1"]


def test_without_a_cache_an_interrupted_run_starts_anew(places, trained, tmp_path, capsys, monkeypatch):
    flags = ("-m", f"local-dir:{places / 'b'}", "--data-dir", places / "data", *FAST, "-o", tmp_path / "h.safetensors")
    extract = features.extract

    def interrupted(*args):
        extract(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "extract", interrupted)
        assert run(train_linear_probe, [*map(str, flags), "--quiet"]) == 130
    warning, error = capsys.readouterr().err.splitlines()
    assert "--cache DIR" in warning
    assert error == "error: interrupted"
    assert list(tmp_path.iterdir()) == []
    call(capsys, train_linear_probe, *flags)
    assert (tmp_path / "h.safetensors").read_bytes() == trained[0].read_bytes()


def test_two_runs_at_once_into_one_file(places, tmp_path):
    head = tmp_path / "h.safetensors"
    code = "import sys; from vitoats.cli.main import main; sys.exit(main())"
    flags = ["-m", f"local-dir:{places / 'b'}", "--data-dir", str(places / "data"), *FAST, "-o", str(head)]
    with hold(head):
        second = subprocess.run([sys.executable, "-c", code, "train_linear_probe", *flags], capture_output=True, text=True)
    assert (second.returncode, second.stdout) == (2, "")
    assert f"another run is writing to {head}" in second.stderr.splitlines()[-1]


def test_features_that_are_interrupted_go_on_at_the_last_piece(tmp_path):
    computed = []

    def compute(order, stop_at=10**9):
        if order[0] >= stop_at:
            raise KeyboardInterrupt
        computed.append(order)
        return Features(torch.tensor(order, dtype=torch.float32).view(-1, 1, 1), torch.tensor(order))

    order = [*range(10)]
    with pytest.raises(KeyboardInterrupt):
        features.cached(tmp_path, "k", order, lambda some: compute(some, stop_at=6), piece=3)
    assert computed == [[0, 1, 2], [3, 4, 5]]
    found = features.cached(tmp_path, "k", order, compute, piece=3)
    assert computed == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert found.labels.tolist() == found.tokens.flatten().tolist() == order
    assert [file.name for file in tmp_path.iterdir()] == ["features-k.safetensors"]
    for name in ("k.safetensors.lock", "k-3.safetensors.lock", "k-6.safetensors.writing"):  # which a killed run may leave
        (tmp_path / f".features-{name}").touch()
    features.cached(tmp_path, "k", order, compute, piece=3)
    assert [file.name for file in tmp_path.iterdir()] == ["features-k.safetensors"]
