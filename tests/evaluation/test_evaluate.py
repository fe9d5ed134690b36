"""Proves that accuracy is counted right, and that a model has the same accuracy in torch, as a folder and as an ONNX file."""

import json
import shutil

import onnx
import pytest
import torch
from PIL import Image

from tests.conftest import TINY, write_image
from vitoats.cli.common import run
from vitoats.cli.compress import main as compress
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.cli.train_linear_probe import main as train_linear_probe
from vitoats.common.errors import InputError, RunError
from vitoats.data.images import batches, open_images
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.accuracy import evaluate
from vitoats.evaluation.probe import train_linear_head

import timm  # isort: skip
from timm.models import save_for_hf  # isort: skip

TRANSFORM = Preprocessing(img_size=32).transform()


def said_by(capsys, main, *argv):
    """Runs a command that succeeds; gives its JSON line and what it wrote on stderr."""
    status = run(main, [*map(str, argv), "--threads", "1", "--quiet"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out.splitlines()[-1]), err


def refused(capsys, main, *argv):
    """Runs a command that is refused; gives its one line."""
    status = run(main, [*map(str, argv), "--threads", "1", "--quiet"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    return lines[0]


# ---- counting, on answers that are written down


def stream(logits, labels, batch_size):
    """Batches whose 'images' are the answers themselves."""
    for i in range(0, len(labels), batch_size):
        yield logits[i : i + batch_size], labels[i : i + batch_size]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 64])
def test_top1_and_top5_by_hand(batch_size):
    # 10 images, 8 classes; the label's place among the logits is written down for each image
    places = [0, 0, 0, 1, 4, 4, 5, 7, 2, 0]
    labels = torch.tensor([3, 1, 0, 7, 2, 2, 5, 6, 4, 1])
    logits = torch.zeros(10, 8)
    for row, (place, label) in enumerate(zip(places, labels.tolist(), strict=True)):
        others = [c for c in range(8) if c != label]
        order = [*others[:place], label, *others[place:]]
        for rank, c in enumerate(order):
            logits[row, c] = -rank
    result = evaluate(lambda x: x, stream(logits, labels, batch_size), n_classes=8)
    assert (result.n_images, result.correct1, result.correct5) == (10, 4, 8)
    assert (result.top1, result.top5) == (40.0, 80.0)
    assert result.predictions == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("n_classes", [1, 2, 4, 5])
def test_top5_of_five_classes_or_fewer_is_everything(n_classes):
    labels = torch.arange(6) % n_classes
    logits = torch.zeros(6, n_classes)
    logits[:, 0] = 1
    result = evaluate(lambda x: x, stream(logits, labels, 4), n_classes)
    assert result.top5 == 100.0
    assert result.correct1 == int((labels == 0).sum())


def test_accuracy_is_the_mean_over_images_not_over_batches():
    labels = torch.zeros(5, dtype=torch.long)
    logits = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1]])  # the last batch has one image, and it is wrong
    assert evaluate(lambda x: x, stream(logits, labels, 4), 2).top1 == 80.0


@pytest.mark.parametrize(
    ("logits", "labels", "n_classes", "said"),
    [
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), 5, "5 classes, but the model knows 3"),
        (torch.zeros(4, 3), torch.full((4,), -1), None, "no labels"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 3, "no image to evaluate"),
        (torch.zeros(4, 7, 3), torch.zeros(4, dtype=torch.long), 3, "`head`"),
    ],
)
def test_what_cannot_be_evaluated(logits, labels, n_classes, said):
    with pytest.raises(InputError, match=said):
        evaluate(lambda x: x, stream(logits, labels, 4), n_classes)


# ---- counting, on image files


def colour_of(images):
    """A model whose answers are known: logits are the mean of each channel."""
    return images.mean(dim=(2, 3))


@pytest.fixture
def coloured(tmp_path):
    """Red, green and blue images in folders 0, 1, 2; two reds and a blue lie in a wrong folder."""
    colours = {"r": (200, 0, 0), "g": (0, 200, 0), "b": (0, 0, 200)}
    for folder, content in {"0": "rrrrr", "1": "gggrr", "2": "bbb"}.items():
        for i, colour in enumerate(content):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (40, 40), colours[colour]).save(tmp_path / folder / f"{i}.png")
    Image.new("RGB", (40, 40), colours["b"]).save(tmp_path / "0" / "wrong.png")
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 4, 5, 14, 100])
def test_known_answers_on_files(coloured, batch_size):
    dataset = open_images(str(coloured), "test", Preprocessing(img_size=32, mean=(0, 0, 0), std=(1, 1, 1)).transform())
    result = evaluate(colour_of, batches(dataset, list(range(len(dataset))), batch_size, 0), len(dataset.classes))
    assert (result.n_images, result.correct1) == (14, 11)
    assert result.predictions == [0] * 5 + [2] + [1] * 3 + [0] * 2 + [2] * 3


def test_unreadable_files_count_neither_way(coloured):
    (coloured / "1" / "aa.png").write_bytes(b"noise")
    (coloured / "2" / "zz.png").write_bytes(b"")
    dataset = open_images(str(coloured), "test", Preprocessing(img_size=32, mean=(0, 0, 0), std=(1, 1, 1)).transform())
    assert len(dataset) == 16
    result = evaluate(colour_of, batches(dataset, list(range(16)), 4, 0), 3)
    assert (result.n_images, result.correct1) == (14, 11)


# ---- the command


@pytest.fixture(scope="module")
def files(tiny_folder, flat_images, image_tree, tmp_path_factory):
    """A backbone with a head that works, as a timm folder and as ONNX; and compressed: factored, dense and as ONNX."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 0}), str(root / "backbone"))
    flags = ["--model", f"local-dir:{root / 'backbone'}", "--threads", "1", "--quiet"]
    data = ["--data-dir", str(image_tree), "--solver", "lbfgs"]
    assert run(train_linear_probe, [*flags, *data, "--output", str(root / "head.safetensors")]) == 0
    flags += ["--head", str(root / "head.safetensors")]
    for name, settings in {"factored": [], "dense": ["--format", "dense"]}.items():
        out = ["--output", str(root / name), "--iterations", "5", "--compression", "0.3", *settings]
        assert run(compress, [*flags, "--data-dir", str(flat_images), *out]) == 0
    assert run(export_onnx, [str(root / "factored"), "-o", str(root / "sparse.onnx"), "--quiet"]) == 0
    assert run(export_onnx, [*flags[:2], *flags[-2:], "-o", str(root / "original.onnx"), "--quiet"]) == 0
    return root


# ---- logits that are no numbers


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_no_answer(broken):
    """Their largest would be found all the same."""
    logits, labels = torch.randn(10, 4), torch.zeros(10, dtype=torch.long)
    logits[5, 2] = logits[6, 0] = broken
    with pytest.raises(RunError, match=r"logits are not finite .* for 2 of the 10 images"):
        evaluate(lambda x: x, stream(logits, labels, 10))
    assert evaluate(lambda x: x, stream(logits[:5], labels[:5], 5)).n_images == 5


def test_outputs_that_do_not_count_may_be_anything():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 0, 1])
    logits[:, 3] = float("-inf")
    assert evaluate(lambda x: x, stream(logits, labels, 4), valid_labels=[0, 4]).n_images == 4


def test_what_overflows_in_float16_fails_and_names_the_type_that_does_not(image_tree, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    torch.nn.init.normal_(model.head.weight, std=1e5)
    save_for_hf(model, str(tmp_path / "large"), safe_serialization=True)
    argv = ["--model", f"local-dir:{tmp_path / 'large'}", "--data-dir", image_tree, "--amp"]
    status = run(eval_imagenet, [*map(str, argv), "--amp-dtype", "float16", "--threads", "1", "--quiet"])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert "logits under autocast to float16 are not finite" in err
    assert err.rstrip().endswith("use --amp-dtype bfloat16")
    assert said_by(capsys, eval_imagenet, *argv)[0]["n_images"] == 24  # bfloat16 on a CPU


def test_a_trained_head_knows_its_images(files, image_tree, capsys):
    flags = ("--model", f"local-dir:{files / 'backbone'}", "--head", files / "head.safetensors", "--data-dir", image_tree)
    result, _ = said_by(capsys, eval_imagenet, *flags)
    original, _ = said_by(capsys, eval_imagenet, "--model", files / "original.onnx", "--data-dir", image_tree)
    assert result["top1"] == original["top1"] > 90  # it was trained on these 24 images; guessing gives 25


@pytest.fixture
def harder(tmp_path, image_tree):
    """The images of the tree and others of no class, so that accuracy lies between 0 and 100."""
    shutil.copytree(image_tree, tmp_path / "tree")
    for i in range(30):
        write_image(tmp_path / "tree" / f"class{i % 4}" / f"n{i}.png", 100 + i)
    (tmp_path / "tree" / "class2" / "broken.png").write_bytes(b"noise")
    return tmp_path / "tree"


def test_accuracy_is_the_same_in_every_form(files, harder, capsys):
    seen = {}
    for name in ("factored", "dense", "sparse.onnx"):
        result, err = said_by(capsys, eval_imagenet, "--model", files / name, "--data-dir", harder, "--batch-size", "7")
        assert "broken.png" in err
        assert "image files skipped: 1" in err
        assert result["n_images"] == 54
        assert result["top1"] + result["top1_err"] == pytest.approx(100)
        assert result["img_size"] == 32
        seen[name] = (result["top1"], result["top5"])
    assert len(set(seen.values())) == 1, seen
    top1, top5 = seen["factored"]
    assert 100 / 54 < top1 < 100
    assert top5 == 100


def test_batch_size_and_workers_change_nothing(files, harder, capsys):
    seen = set()
    for flags in ((), ("--batch-size", "1"), ("--batch-size", "53"), ("--workers", "1")):
        seen.add(said_by(capsys, eval_imagenet, "--model", files / "factored", "--data-dir", harder, *flags)[0]["top1"])
    assert len(seen) == 1


def test_first_images_only(files, image_tree, capsys):
    flags = ("--model", files / "factored", "--data-dir", image_tree, "--num-samples", "5", "--batch-size", "2")
    assert said_by(capsys, eval_imagenet, *flags)[0]["n_images"] == 5


def test_columns_of_the_json_line(files, image_tree, capsys):
    result, _ = said_by(capsys, eval_imagenet, "--model", files / "factored", "--data-dir", image_tree)
    timm_columns = {"model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"}
    assert timm_columns < result.keys()
    assert result["n_images"] == 24


def test_param_count_is_the_same_for_folder_and_onnx(files, image_tree, capsys):
    counts = {
        said_by(capsys, eval_imagenet, "--model", files / name, "--data-dir", image_tree)[0]["param_count"]
        for name in ("factored", "sparse.onnx")
    }
    assert len(counts) == 1


@pytest.mark.parametrize("name", ["factored", "sparse.onnx"])
def test_what_the_command_refuses(files, image_tree, flat_images, tmp_path, capsys, name):
    model = ("--model", files / name)
    assert "no labels" in refused(capsys, eval_imagenet, *model, "--data-dir", flat_images)
    for i in range(12):
        write_image(tmp_path / "six" / f"c{i % 6}" / f"{i}.png", i)
        (tmp_path / "bad" / "class0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bad" / "class0" / f"{i}.png").write_bytes(b"noise")
    assert "6 classes, but the model knows 4" in refused(capsys, eval_imagenet, *model, "--data-dir", tmp_path / "six")
    assert "readable images" in refused(capsys, eval_imagenet, *model, "--data-dir", tmp_path / "bad")
    assert "--data-dir" in refused(capsys, eval_imagenet, *model)
    assert str(tmp_path / "none") in refused(capsys, eval_imagenet, *model, "--data-dir", tmp_path / "none")


@pytest.mark.parametrize(
    "flags",
    [
        # nothing of this can be done to an ONNX file, and none of it may be ignored in silence
        ["--head", "h.pth"],
        ["--head-layers", "4"],
        ["--checkpoint", "w.pth"],
        ["--img-size", "64"],
        ["--random-weights"],
        ["--device", "cuda"],
    ],
)
def test_flags_that_an_onnx_file_cannot_follow(files, image_tree, capsys, flags):
    line = refused(capsys, eval_imagenet, "--model", files / "sparse.onnx", "--data-dir", image_tree, *flags)
    assert flags[0] in line


@pytest.mark.parametrize("content", [b"hello", b"", b"\x08\x09"])
def test_a_file_that_is_not_onnx(tmp_path, image_tree, capsys, content):
    (tmp_path / "model.onnx").write_bytes(content)
    line = refused(capsys, eval_imagenet, "--model", tmp_path / "model.onnx", "--data-dir", image_tree)
    assert str(tmp_path / "model.onnx") in line
    assert "none.onnx" in refused(capsys, eval_imagenet, "--model", tmp_path / "none.onnx", "--data-dir", image_tree)


def test_an_onnx_file_without_preprocessing_is_refused(files, image_tree, tmp_path, capsys):
    model = onnx.load(str(files / "original.onnx"))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))
    line = refused(capsys, eval_imagenet, "--model", tmp_path / "bare.onnx", "--data-dir", image_tree)
    assert "preprocess" in line
    model.metadata_props.add(key="vitoats", value="{not json")
    onnx.save(model, str(tmp_path / "odd.onnx"))
    assert "odd.onnx" in refused(capsys, eval_imagenet, "--model", tmp_path / "odd.onnx", "--data-dir", image_tree)


def test_a_backbone_without_classifier_is_no_classifier(files, image_tree, capsys):
    """Its 48 features are not the logits of 48 classes."""
    line = refused(capsys, eval_imagenet, "--model", f"local-dir:{files / 'backbone'}", "--data-dir", image_tree)
    assert "--head" in line


# ---- training a head


def test_training_minimises_the_penalised_cross_entropy():
    torch.manual_seed(0)
    y = torch.randint(0, 3, (400,))
    x = torch.randn(400, 6) * torch.tensor([1, 1, 1, 10, 0.1, 3]) + 5
    x[:, :3] += 2 * torch.nn.functional.one_hot(y, 3)
    weight, bias = train_linear_head(x, y, 3)
    accuracy = ((x @ weight.T + bias).argmax(1) == y).float().mean()
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    nearest = ((x[:, None, :3] - means[None, :, :3]).square().sum(-1).argmin(1) == y).float().mean()
    assert accuracy > nearest - 0.03  # the nearest mean of the informative features is about the best there is

    mean, std = x.mean(0), x.std(0)
    w = (weight * std).detach().requires_grad_()
    b = (bias + weight @ mean).detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy((x - mean) / std @ w.T + b, y) + 3e-3 * w.square().sum()
    loss.backward()
    assert w.grad.abs().max() < 1e-3  # a stationary point
    assert b.grad.abs().max() < 1e-3


@pytest.mark.parametrize("layers", ["1", "4"])
def test_probe_command_writes_a_head_that_evaluates_as_it_says(image_tree, tmp_path, capsys, layers):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 0, "depth": 4})
    save_for_hf(model, str(tmp_path / "b"))
    head = tmp_path / "new" / "head.safetensors"
    flags = ("--model", f"local-dir:{tmp_path / 'b'}", "--data-dir", image_tree)
    trained, _ = said_by(capsys, train_linear_probe, *flags, "--output", head, "--head-layers", layers, "--solver", "lbfgs")
    assert trained["layers"] == int(layers)
    evaluated, _ = said_by(capsys, eval_imagenet, *flags, "--head", head)
    assert evaluated["top1"] == trained["top1"] == 100.0
    assert "--overwrite" in refused(capsys, train_linear_probe, *flags, "--output", head)


def test_probe_refuses_what_it_cannot_train_on(image_tree, flat_images, tmp_path, capsys):
    torch.manual_seed(0)
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 0}), str(tmp_path / "b"))
    model, out = ("--model", f"local-dir:{tmp_path / 'b'}"), ("--output", tmp_path / "h.safetensors")
    assert "no labels" in refused(capsys, train_linear_probe, *model, *out, "--data-dir", flat_images)
    (tmp_path / "bad" / "a").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "bad" / "a" / f"{i}.png").write_bytes(b"noise")
    assert "--data-dir" in refused(capsys, train_linear_probe, *model, *out, "--data-dir", tmp_path / "bad")
    assert not (tmp_path / "h.safetensors").exists()
