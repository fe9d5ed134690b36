"""Proves how images are found, read, prepared and drawn: folder layouts, labels, files that are no images, and the sample."""

import gzip
import json
import logging
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_image
from vitoats.common.errors import InputError
from vitoats.data.images import batches, calibration_batches, digest, open_images, shuffled
from vitoats.data.transforms import Preprocessing

PREPROCESSING = Preprocessing(img_size=32)
TRANSFORM = PREPROCESSING.transform()


def names(dataset):
    return [path.rpartition("/")[2] for path in dataset.paths]


@pytest.fixture
def warnings_of():
    """The lines that the package logs."""
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("vitoats"), Keep(level=logging.WARNING)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


# ---- layouts of folders


def test_class_folders_give_labels_in_the_order_of_their_names(image_tree):
    dataset = open_images(str(image_tree), "test", TRANSFORM)
    assert dataset.classes == ("class0", "class1", "class2", "class3")
    assert len(dataset) == 24
    for path, label in zip(dataset.paths, dataset.labels, strict=True):
        assert f"/class{label}/" in path
    assert dataset[7][1] == 1


def test_flat_folder_has_no_labels(flat_images):
    dataset = open_images(str(flat_images), "train", TRANSFORM)
    assert (len(dataset), dataset.classes, dataset.labels) == (20, (), None)
    assert names(dataset) == sorted(names(dataset))
    assert dataset[0][1] == -1


@pytest.mark.parametrize(
    ("folders", "split", "taken"),
    [
        # calibration takes train, evaluation takes val, validation or test
        (("train", "val"), "train", "train"),
        (("train", "val"), "test", "val"),
        (("train", "validation"), "test", "validation"),
        (("train", "test"), "test", "test"),
    ],
)
def test_splits_inside_a_folder(tmp_path, folders, split, taken):
    for folder in folders:
        write_image(tmp_path / folder / "a" / f"{folder}.png", 0)
        write_image(tmp_path / folder / "b" / f"{folder}.png", 1)
    dataset = open_images(str(tmp_path), split, TRANSFORM)
    assert dataset.classes == ("a", "b")
    assert names(dataset) == [f"{taken}.png"] * 2


@pytest.mark.parametrize(
    ("files", "classes", "found"),
    [
        # any case of the ending
        (("a/1.JPEG", "b/2.Png"), ("a", "b"), ["1.JPEG", "2.Png"]),
        # an image's class is the folder it lies in, as in timm
        (("a/deep/er/1.png", "b/2.png"), ("b", "er"), ["1.png", "2.png"]),
        # a hidden folder is no class
        ((".cache/0.png", "a/1.png"), ("a",), ["1.png"]),
        # images beside an unrelated folder are a flat folder
        (("1.png", "notes/readme.txt"), (), ["1.png"]),
        # numbered folders and files go by number, as timm's do (torchvision's go by character)
        (("10/x.png", "9/y.png"), ("9", "10"), ["y.png", "x.png"]),
        (("a/10.png", "a/9.png", "B/1.png"), ("a", "B"), ["9.png", "10.png", "1.png"]),
    ],
)
def test_what_is_found(tmp_path, files, classes, found):
    for i, file in enumerate(files):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("x")
        else:
            write_image(path, i)
    dataset = open_images(str(tmp_path), "test", TRANSFORM)
    assert (dataset.classes, names(dataset)) == (classes, found)


def test_files_that_are_no_images_by_name_are_left_out_with_a_count(tmp_path, warnings_of):
    write_image(tmp_path / "1.png", 0)
    for i in range(5):
        (tmp_path / f"note{i}.txt").write_text("x")
    assert names(open_images(str(tmp_path), "test", TRANSFORM)) == ["1.png"]
    assert len(warnings_of) == 1
    assert "by their name: 5" in warnings_of[0]
    assert "note0.txt" in warnings_of[0]
    assert "2 more" in warnings_of[0]


def test_a_linked_class_folder_counts(tmp_path, image_tree):
    (tmp_path / "linked").symlink_to(image_tree / "class0")
    assert len(open_images(str(tmp_path), "test", TRANSFORM)) == 6


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "text only", "empty classes"])
def test_nothing_to_read_is_one_clear_error(tmp_path, kind):
    root = tmp_path / "data"
    if kind == "file":
        write_image(tmp_path / "data.png", 0)
        root = tmp_path / "data.png"
    elif kind != "missing":
        root.mkdir()
    if kind == "text only":
        (root / "a.txt").write_text("x")
    if kind == "empty classes":
        (root / "a").mkdir()
        (root / "b").mkdir()
    with pytest.raises(InputError, match=r"there (is|are) no image.*`images`") as error:
        open_images(str(root), "test", TRANSFORM)
    assert str(root) in str(error.value)


# ---- the gz files of MNIST and Fashion-MNIST


def write_idx(root, prefix, images, labels):
    with gzip.open(root / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">iiii", 2051, len(images), 28, 28) + images.tobytes())
    with gzip.open(root / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">ii", 2049, len(labels)) + labels.tobytes())


def test_idx_files(tmp_path):
    random = np.random.default_rng(0)
    train, test = (random.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (5, 3))
    write_idx(tmp_path, "train", train, np.arange(5, dtype=np.uint8))
    write_idx(tmp_path, "t10k", test, np.arange(3, dtype=np.uint8))
    dataset = open_images(str(tmp_path), "test", TRANSFORM)
    assert len(dataset) == 3
    assert np.array_equal(dataset.images, test)
    image, label = dataset[2]
    assert label == 2
    assert torch.equal(image, TRANSFORM(Image.fromarray(test[2]).convert("RGB")))
    assert len(open_images(str(tmp_path), "train", TRANSFORM)) == 5


@pytest.mark.parametrize("damage", ["cut", "not gz", "no labels", "odd length"])
def test_damaged_idx_files_are_named(tmp_path, damage):
    write_idx(tmp_path, "t10k", np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8))
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:20])
    elif damage == "not gz":
        file.write_bytes(b"hello")
    elif damage == "odd length":  # whole as a gz file, but its pixels end in the middle of an image
        with gzip.open(file, "wb") as out:
            out.write(b"\0" * (16 + 1000))
    else:
        file = tmp_path / "t10k-labels-idx1-ubyte.gz"
        file.unlink()
    with pytest.raises(InputError, match=file.name):
        open_images(str(tmp_path), "test", TRANSFORM)


# ---- the sample inside the package


def test_sample():
    train, test = (open_images("sample", split, TRANSFORM) for split in ("train", "test"))
    assert (len(train), len(test)) == (512, 2000)
    assert len(test.classes) == 10
    assert set(test.labels.tolist()) == set(range(10))
    image, label = test[0]
    assert image.shape == (3, 32, 32)
    assert 0 <= label < 10
    seen = {i.tobytes() for i in train.images}
    assert not any(i.tobytes() in seen for i in test.images)  # nothing is tested on what it was calibrated on


# ---- decoding


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    if mode == "I;16":
        Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)).save(path)
    else:
        Image.effect_noise((40, 40), 60).convert("RGB").convert(mode).save(path)
    image, _ = open_images(str(tmp_path), "test", TRANSFORM)[0]
    assert image.shape == (3, 32, 32)
    assert torch.isfinite(image).all()
    assert image.std() > 0.05  # not blank, not clipped to one value


def test_preprocessing_center_crops_and_normalises(tmp_path):
    # 80 x 40 pixels: short side to 32 / 0.5 = 64, then the middle 32 x 32, all of which lies in the green middle
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:60, 1] = pixels[:, 60:, 2] = 255
    image = Image.fromarray(pixels)
    center = Preprocessing(img_size=32, crop_pct=0.5, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0)).transform()(image)
    expected = torch.tensor([-1.0, 3.0, 0.0])[:, None, None].expand(3, 32, 32)
    torch.testing.assert_close(center, expected)
    # squashed, the whole width is there: a quarter red, half green, a quarter blue
    squash = Preprocessing(img_size=32, crop_pct=0.5, mean=(0, 0, 0), std=(1, 1, 1)).with_crop_mode("squash").transform()(image)
    assert squash.shape == (3, 32, 32)
    torch.testing.assert_close(squash.mean(dim=(1, 2)), torch.tensor([0.25, 0.5, 0.25]), atol=0.02, rtol=0)
    assert squash[:, 16, 1].tolist() == pytest.approx([1, 0, 0], abs=0.05)


def test_preprocessing_survives_json_and_refuses_nonsense():
    before = Preprocessing(img_size=98, crop_pct=0.9, crop_mode="border", interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    assert Preprocessing.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    with pytest.raises(InputError, match="center, squash, border"):
        before.with_crop_mode("centre")
    config = {"input_size": (5, 28, 28), "crop_pct": 1, "crop_mode": "center", "interpolation": "bicubic"}
    with pytest.raises(InputError, match="5 channels"):
        Preprocessing.from_timm(config | {"mean": (0.5,) * 5, "std": (0.5,) * 5})


# ---- batches, and files that cannot be decoded


BROKEN = {"text.png": b"no image", "empty.jpg": b"", "cut.jpg": None, "cut.png": None}


@pytest.fixture
def with_broken(tmp_path):
    """18 good images, and 4 files that are none."""
    for i in range(18):
        write_image(tmp_path / f"{i:02}.jpg", i)
    write_image(tmp_path / "cut.png", 99)
    good = {"cut.jpg": (tmp_path / "00.jpg").read_bytes(), "cut.png": (tmp_path / "cut.png").read_bytes()}
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content if content is not None else good[name][: len(good[name]) // 2])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [4, 7, 100])
def test_broken_files_are_named_counted_and_skipped(with_broken, warnings_of, batch_size, workers):
    dataset = open_images(str(with_broken), "test", TRANSFORM)
    assert len(dataset) == 22
    seen = list(batches(dataset, list(range(22)), batch_size, workers))
    images = torch.cat([i for i, _ in seen])
    good = [TRANSFORM(Image.open(with_broken / f"{i:02}.jpg").convert("RGB")) for i in range(18)]
    assert torch.equal(images, torch.stack(good))  # each good image, once, in order
    assert all(len(i) == len(label) > 0 for i, label in seen)
    for name in BROKEN:
        assert sum(name in line for line in warnings_of) == 1
    assert sum("image files skipped: 4" in line for line in warnings_of) == 1


def test_batches_follow_the_order_and_end_with_a_partial_one(image_tree):
    dataset = open_images(str(image_tree), "test", TRANSFORM)
    order = [23, 0, 6, 12, 1, 22, 7]
    seen = list(batches(dataset, order, 3, 0))
    assert [len(images) for images, _ in seen] == [3, 3, 1]
    assert torch.cat([labels for _, labels in seen]).tolist() == [3, 0, 1, 2, 0, 3, 1]
    assert torch.equal(seen[0][0][1], dataset[0][0])


def draw(dataset, nsamples, seed=0, batch_size=4):
    return torch.cat(list(calibration_batches(dataset, nsamples, seed, batch_size, 0)))


def test_calibration_images_are_drawn_by_the_seed(flat_images):
    dataset = open_images(str(flat_images), "train", TRANSFORM)
    first = draw(dataset, 10)
    assert first.shape == (10, 3, 32, 32)
    assert torch.equal(first, draw(dataset, 10, batch_size=7))
    assert not torch.equal(first, draw(dataset, 10, seed=1))
    every = {i.numpy().tobytes() for i in draw(dataset, 20)}
    assert len(every) == 20  # without replacement
    assert {i.numpy().tobytes() for i in first} < every


def test_a_broken_file_is_replaced_by_another_image(with_broken):
    dataset = open_images(str(with_broken), "train", TRANSFORM)
    for seed in range(5):
        drawn = draw(dataset, 18, seed)
        assert len({i.numpy().tobytes() for i in drawn}) == 18


def test_fewer_images_than_asked_for_give_all_with_a_notice(with_broken, warnings_of):
    assert len(draw(open_images(str(with_broken), "train", TRANSFORM), 512)) == 18
    assert any("18" in line and "512" in line for line in warnings_of)


@pytest.mark.parametrize(
    ("kept", "asked", "enough"),
    [
        # 16 do, whatever was asked for; fewer do only when no more were asked for
        (16, 512, True),
        (15, 512, False),
        (15, 16, False),
        (15, 15, True),
        (1, 1, True),
        (0, 1, False),
        (0, 512, False),
    ],
)
def test_too_few_images_left(with_broken, kept, asked, enough):
    for i in range(kept, 18):
        (with_broken / f"{i:02}.jpg").write_bytes(b"x")
    dataset = open_images(str(with_broken), "train", TRANSFORM)
    if enough:
        assert len(draw(dataset, asked)) == min(kept, asked)
        return
    with pytest.raises(InputError, match=rf"only {kept} images can be read.*add images") as error:
        draw(dataset, asked)
    if kept:
        assert f"`nsamples` {kept}" in str(error.value)
    else:  # no number of samples helps where no image can be read
        assert "`nsamples`" not in str(error.value)


def test_a_folder_that_vanishes_meanwhile_is_reported(tmp_path):
    write_image(tmp_path / "set" / "1.png", 0)
    dataset = open_images(str(tmp_path / "set"), "train", TRANSFORM)
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(InputError, match="only 0 images can be read"):
        draw(dataset, 1)


# ---- digests


def digest_of(folder, indices=range(24)):
    return digest(open_images(str(folder), "train", None), indices)


def test_a_digest_tells_images_their_order_and_their_classes_apart(image_tree, tmp_path):
    shutil.copytree(image_tree, tmp_path / "copy")
    before = digest_of(image_tree)
    assert digest_of(tmp_path / "copy") == before
    assert digest_of(image_tree, reversed(range(24))) != before
    assert digest_of(image_tree, range(23)) != before
    (tmp_path / "copy/class1").rename(tmp_path / "copy/class9")
    assert digest_of(tmp_path / "copy") != before


def test_a_digest_sees_a_file_of_the_same_name_size_and_time(image_tree, tmp_path):
    shutil.copytree(image_tree, tmp_path / "copy")
    before = digest_of(tmp_path / "copy")
    file = tmp_path / "copy/class1/01.png"
    content, stat = bytearray(file.read_bytes()), file.stat()
    content[-20] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_of(tmp_path / "copy") != before


def test_a_digest_is_of_the_drawn_images_alone(image_tree, tmp_path):
    shutil.copytree(image_tree, tmp_path / "copy")
    dataset = open_images(str(tmp_path / "copy"), "train", None)
    drawn, rest = shuffled(dataset, 3)[:10], shuffled(dataset, 3)[10:]
    before = digest(dataset, drawn)
    Path(dataset.paths[rest[0]]).write_bytes(b"x")
    assert digest(dataset, drawn) == before
    Path(dataset.paths[drawn[0]]).unlink()  # an image that cannot be read is skipped
    assert digest(dataset, drawn) != before


def test_a_digest_of_images_in_memory():
    train, test = (open_images("sample", split, None) for split in ("train", "test"))
    first = digest(train, range(50))
    assert first == digest(open_images("sample", "train", None), range(50))
    assert len({first, digest(test, range(50)), digest(train, range(1, 51))}) == 3
