"""Proves that eval_imagenet counts what timm's own validation counts, to the image, on the same images in the same order.

``validate`` is timm's validate.py restated with timm's functions: its reader, transforms, loader, real labels and accuracy.
"""

import contextlib
import csv
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY
from vitoats.cli.common import run
from vitoats.cli.compress import main as compress
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.data.images import batches
from vitoats.data.labelled import open_labelled
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.accuracy import evaluate
from vitoats.evaluation.target import onnx_target, torch_target
from vitoats.loading.load import load_model

import timm  # isort: skip
from timm.data import RealLabelsImagenet, create_dataset, create_loader  # isort: skip
from timm.data.model_config import resolve_input_data_config  # isort: skip
from timm.models import save_for_hf  # isort: skip
from timm.utils import AverageMeter, accuracy  # isort: skip

pytestmark = pytest.mark.filterwarnings(  # timm leaves its image files open
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
CLASSES = 12  # class2 comes before class10 in timm's order, after it in alphabetical order


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """61 images of many shapes, modes and formats in 12 classes, under their original names of ImageNet's validation set."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for i in range(61):
        height, width = random.integers(20, 90, 2)
        small = random.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image = image.convert(("RGB", "L", "RGB", "CMYK")[i % 4])
        folder = root / "val" / f"class{random.integers(CLASSES) if i >= CLASSES else i}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG", quality=90)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny ViT of 12 classes, with preprocessing of its own, whose answers vary from image to image."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit") / "model"
    made = timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": CLASSES})
    made.head.weight.data.normal_(0, 1)
    made.pretrained_cfg |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "crop_pct": 0.8, "interpolation": "bilinear"}
    save_for_hf(made, str(folder))
    return folder


def validate(model, root, *, amp=None, valid_labels=None, real_labels=None, class_map=None, **settings):
    """timm's validate.py in its own functions: how many of how many images are right, first and among five."""
    model = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    config = resolve_input_data_config(model, settings, use_test_size=True)
    dataset = create_dataset("", str(root), "validation", class_map=class_map)
    real = None
    if real_labels is not None:  # it asserts that there are all 50000 of them
        real = RealLabelsImagenet.__new__(RealLabelsImagenet)
        real.__dict__ |= {"topk": (1, 5), "is_correct": {1: [], 5: []}, "sample_idx": 0, "filenames": dataset.filenames(True)}
        real.real_labels = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": row for i, row in enumerate(real_labels)}
    loader = create_loader(
        dataset, batch_size=16, use_prefetcher=False, num_workers=0, device=torch.device("cpu"), pin_memory=False,
        **{k: v for k, v in config.items() if k in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )  # fmt: skip
    top1, top5 = AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for batch, target in loader:
            with torch.autocast("cpu", amp) if amp else contextlib.nullcontext():
                output = model(batch)
            if valid_labels is not None:
                output = output[:, valid_labels]
            if real is not None:
                real.add_result(output)
            one, five = accuracy(output, target, topk=(1, 5))
            top1.update(one.item(), batch.size(0))
            top5.update(five.item(), batch.size(0))
    if real is not None:
        return sum(real.is_correct[1]), sum(real.is_correct[5]), len(real.is_correct[1])
    return round(top1.sum / 100), round(top5.sum / 100), top1.count


def ours(capsys, *argv):
    """eval_imagenet's counts and its whole result."""
    status = run(eval_imagenet, [*map(str, argv), "--threads", "1", "--quiet", "--workers", "0"])
    out, err = capsys.readouterr()
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["top1"] == pytest.approx(100 * result["n_correct1"] / result["n_images"], abs=5e-5)
    assert result["top5"] == pytest.approx(100 * result["n_correct5"] / result["n_images"], abs=5e-5)
    assert result["top1_err"] == pytest.approx(100 - result["top1"])
    return (result["n_correct1"], result["n_correct5"], result["n_images"]), result


def refused(capsys, *argv):
    status = run(eval_imagenet, [*map(str, argv), "--threads", "1", "--quiet", "--workers", "0"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    return err.splitlines()[-1]


# ---- timm's counts


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], {}),
        # preprocessing that differs from the model's own
        (["--crop-pct", "1.0"], {"crop_pct": 1.0}),
        (["--crop-pct", "0.6", "--interpolation", "bicubic"], {"crop_pct": 0.6, "interpolation": "bicubic"}),
        (["--interpolation", "nearest"], {"interpolation": "nearest"}),
        (["--mean", "0.5", "--std", "0.5"], {"mean": (0.5,), "std": (0.5,)}),
        (["--mean", "0.1", "0.2", "0.3", "--std", "1", "2", "3"], {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}),
        (["--crop-mode", "border"], {"crop_mode": "border"}),
        # squash keeps the whole image, as the OATS paper has it, unless a crop is asked for
        (["--crop-mode", "squash"], {"crop_mode": "squash", "crop_pct": 1.0}),
        (["--crop-mode", "squash", "--crop-pct", "0.8"], {"crop_mode": "squash", "crop_pct": 0.8}),
        (["--input-size", "3", "32", "32"], {"input_size": (3, 32, 32)}),
        # half precision
        (["--amp"], {"amp": torch.bfloat16}),
        (["--amp", "--amp-dtype", "float16"], {"amp": torch.float16}),
    ],
)
def test_the_counts_are_timms(images, model, capsys, flags, settings):
    expected = validate(model, images, **settings)
    assert 0 < expected[0] < expected[1] < expected[2] == 61
    for batch in ("16", "7"):
        # under autocast a batch's size decides how its products are rounded
        if batch == "16" or "amp" not in settings:
            found, _ = ours(capsys, "-m", f"local-dir:{model}", images, "-b", batch, *flags)
            assert found == expected


def test_the_setting_matters(images, model):
    """Otherwise the test above would compare equal things."""
    settings = [{}, {"crop_pct": 0.6}, {"mean": (0.5,), "std": (0.5,)}, {"crop_mode": "squash", "crop_pct": 1.0}]
    assert len({validate(model, images, **s) for s in settings}) == len(settings)


def test_valid_labels(images, model, tmp_path, capsys):
    """12 classes of images, whose outputs are others of a larger model, or in another order."""
    chosen = [3, 1, 7, 0, 2, 11, 10, 9, 8, 4, 5, 6]
    (tmp_path / "valid.txt").write_text("\n".join(map(str, chosen)) + "\n")
    found, _ = ours(capsys, "-m", f"local-dir:{model}", images, "--valid-labels", tmp_path / "valid.txt")
    assert found == validate(model, images, valid_labels=chosen) != validate(model, images)


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_class_map(images, model, tmp_path, capsys, form):
    """Images of classes that the map does not name are left out, as timm does."""
    names = ["class4", "class11", "class2", "class0", "absent", "class7"]
    (tmp_path / "map.txt").write_text("\n".join(names) + "\n")
    data = as_tar(images, tmp_path) if form == "tar" else images
    found, _ = ours(capsys, "-m", f"local-dir:{model}", data, "--class-map", tmp_path / "map.txt")
    assert found == validate(model, images, class_map=str(tmp_path / "map.txt"))
    assert 0 < found[2] < 61


def test_real_labels(images, model, tmp_path, capsys):
    random = np.random.default_rng(1)
    labels = [random.choice(CLASSES, random.integers(0, 4), replace=False).tolist() for _ in range(61)]
    assert [] in labels
    (tmp_path / "real.json").write_text(json.dumps(labels))
    found, _ = ours(capsys, "-m", f"local-dir:{model}", images, "--real-labels", tmp_path / "real.json")
    assert found == validate(model, images, real_labels=labels)
    assert found[2] == sum(map(bool, labels))


def as_tar(images, folder):
    """The images as one .tar file."""
    with tarfile.open(folder / "val.tar", "w") as tar:
        tar.add(images / "val", arcname="val")
    return folder / "val.tar"


def as_tar_of_tars(images, folder):
    """One .tar for each class inside a .tar, as ImageNet's training images come."""
    for one in (images / "val").iterdir():
        with tarfile.open(folder / f"{one.name}.tar", "w") as tar:
            for file in one.iterdir():
                tar.add(file, arcname=file.name)
    (folder / "all").mkdir()
    with tarfile.open(folder / "all" / "train.tar", "w") as tar:
        for one in folder.glob("*.tar"):
            tar.add(one, arcname=one.name)
    return folder / "all" / "train.tar"


@pytest.mark.parametrize("make", [as_tar, as_tar_of_tars])
def test_tar_files(images, model, tmp_path, capsys, make):
    found, _ = ours(capsys, "-m", f"local-dir:{model}", make(images, tmp_path))
    assert found == validate(model, images)


def test_a_pickle_beside_a_tar_is_not_opened(images, model, tmp_path, capsys):
    """timm keeps the contents of large .tar files in one."""
    file = as_tar(images, tmp_path)
    (tmp_path / "_val_tarinfos.pickle").write_bytes(b"no pickle")
    ours(capsys, "-m", f"local-dir:{model}", file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["_val_tarinfos.pickle", "val.tar"]


def test_data_sets_by_timms_name(images, model, tmp_path, capsys):
    found, _ = ours(capsys, "-m", f"local-dir:{model}", "--dataset", "torch/image_folder", "--data-dir", images)
    # torchvision sorts its folders by character, so the classes are others than timm's
    names = sorted(f"class{i}" for i in range(CLASSES))
    (tmp_path / "map.txt").write_text("\n".join(names))
    assert found == validate(model, images, class_map=str(tmp_path / "map.txt"))


# ---- the same images in the same order in every form


@pytest.fixture(scope="module")
def forms(model, images, tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    flags = ["--threads", "1", "--quiet"]
    done = f"--data-dir {images} --method oats --compression 0.3 --iterations 3 --output {root / 'small'}".split()
    assert run(compress, ["--model", f"local-dir:{model}", *done, *flags]) == 0
    assert run(export_onnx, [str(root / "small"), "-o", str(root / "small.onnx"), *flags]) == 0
    return root


def test_folder_and_onnx_give_each_image_the_same_class(forms, images):
    answers = []
    for target in (torch_target(load_model(str(forms / "small")), "cpu"), onnx_target(str(forms / "small.onnx"), 1)):
        assert target.preprocessing == Preprocessing(32, 0.8, "center", "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
        dataset = open_labelled(str(images), target.preprocessing.transform())
        result = evaluate(target.predict, batches(dataset, list(range(61)), 16, 0))
        answers.append(result.predictions)
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 3


def test_order_is_timms(images):
    dataset = open_labelled(str(images), lambda image: image)
    assert dataset.paths == create_dataset("", str(images), "validation").filenames(absolute=True)


def test_columns(forms, model, images, capsys):
    timms = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]
    more = ("compression", "nnz", "rank_params")
    _, folder = ours(capsys, "-m", forms / "small", images)
    _, onnx = ours(capsys, "-m", forms / "small.onnx", images)
    _, dense = ours(capsys, "-m", f"local-dir:{model}", images)
    for result in (folder, onnx, dense):
        assert list(result)[:9] == timms
        assert (result["img_size"], result["crop_pct"], result["interpolation"]) == (32, 0.8, "bilinear")
        assert result["device"] == "cpu"
    assert [folder[k] for k in more] == [onnx[k] for k in more]
    assert [dense[k] for k in more] == [None, None, None]
    assert folder["compression"] == pytest.approx(0.3, abs=0.01)
    block_weights = sum(p.numel() for n, p in load_model(f"local-dir:{model}").model.blocks.named_parameters() if p.ndim == 2)
    assert folder["nnz"] + folder["rank_params"] == pytest.approx((1 - folder["compression"]) * block_weights)
    assert onnx["file_mb"] == round((forms / "small.onnx").stat().st_size / 1e6, 3)


def test_preprocessing_of_an_onnx_file_can_be_changed(forms, images, capsys):
    """By the flags that leave its image size."""
    flags = ("--crop-mode", "squash", "--interpolation", "bicubic", "--mean", "0.5", "--std", "0.5")
    found, result = ours(capsys, "-m", forms / "small.onnx", images, *flags)
    assert (result["crop_mode"], result["crop_pct"], result["interpolation"]) == ("squash", 1.0, "bicubic")
    assert found == ours(capsys, "-m", forms / "small", images, *flags)[0]


def test_preprocessing_is_printed(forms, images, capsys):
    run(eval_imagenet, ["-m", str(forms / "small.onnx"), str(images), "--threads", "1", "--workers", "0", "--log-freq", "2"])
    err = capsys.readouterr().err
    assert "32 px, center crop 0.8, bilinear, mean 0.5/0.4/0.3, std 0.2/0.25/0.3" in err
    assert err.count("Test: [") == 0  # one batch of 64 only
    run(eval_imagenet, ["-m", str(forms / "small.onnx"), str(images), "-b", "10", "--workers", "0", "--log-freq", "2"])
    assert capsys.readouterr().err.count("Test: [") == 3


@pytest.mark.parametrize(("name", "flags"), [("r.csv", []), ("r.txt", ["--results-format", "csv"]), ("r.json", [])])
def test_results_file(model, images, tmp_path, capsys, name, flags):
    _, result = ours(capsys, "-m", f"local-dir:{model}", images, "--results-file", tmp_path / name, *flags)
    text = (tmp_path / name).read_text()
    if name == "r.json":
        assert json.loads(text) == result
        return
    (row,) = csv.DictReader(text.splitlines())
    assert row == {k: "" if v is None else str(v) for k, v in result.items()}


def test_num_samples_covers_the_classes(model, images, capsys):
    found, _ = ours(capsys, "-m", f"local-dir:{model}", images, "--num-samples", "20")
    assert found[2] == 20
    found, _ = ours(capsys, "-m", f"local-dir:{model}", images, "--num-samples", "1000")
    assert found == validate(model, images)


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "nope/x"], "hfds/"),
        (["--dataset", "torch/nope"], "torch/nope"),
        (["--dataset", "hfds/owner/name"], "pip install"),
        (["--dataset", "torch/cifar10", "--data-dir", "NONE"], "cifar10"),
        (["--split", "other"], "--split"),
        (["--class-map", "NONE.txt"], "--class-map"),
        (["--valid-labels", "NONE"], "--valid-labels"),
        (["--real-labels", "NONE"], "--real-labels"),
        (["--mean", "1", "2"], "--mean"),
        (["--input-size", "1", "32", "32"], "in_chans=1"),
        (["--input-size", "3", "32", "32", "--img-size", "40"], "contradict"),
        (["--amp-dtype", "bfloat16"], "--amp"),
        (["--crop-pct", "0"], "--crop-pct"),
    ],
)
def test_bad_flags(model, images, tmp_path, capsys, flags, said):
    flags = [str(tmp_path / f) if f.startswith("NONE") else f for f in flags]
    data = [] if "--data-dir" in flags else [images]
    assert said in refused(capsys, "-m", f"local-dir:{model}", *data, *flags)


def test_bad_files(model, images, tmp_path, capsys):
    start = ("-m", f"local-dir:{model}", images)
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"class1": 0}))
    assert ".txt" in refused(capsys, *start, "--class-map", tmp_path / "map.pkl")
    (tmp_path / "map.txt").write_text("x\ny\n")
    assert "names none" in refused(capsys, *start, "--class-map", tmp_path / "map.txt")
    (tmp_path / "map.txt").write_text("".join(f"x{i}\n" for i in range(40)) + "class3\n")
    assert "41 classes, but the model knows 12" in refused(capsys, *start, "--class-map", tmp_path / "map.txt")
    (tmp_path / "valid.txt").write_text("1\n12\n")
    assert "12" in refused(capsys, *start, "--valid-labels", tmp_path / "valid.txt")
    (tmp_path / "valid.txt").write_text("one\n")
    assert "whole numbers" in refused(capsys, *start, "--valid-labels", tmp_path / "valid.txt")
    (tmp_path / "real.json").write_text("[[1], [2]]")
    assert "no label" in refused(capsys, *start, "--real-labels", tmp_path / "real.json")
    (tmp_path / "real.json").write_text('{"a": 1}')
    assert "real.json" in refused(capsys, *start, "--real-labels", tmp_path / "real.json")
    (tmp_path / "bad.tar").write_bytes(b"noise")
    assert "bad.tar" in refused(capsys, *start[:2], tmp_path / "bad.tar")
