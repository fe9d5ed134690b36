"""Python does what the command line does: the same folder, byte for byte, and errors that speak of arguments."""

import copy
import filecmp
import logging

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import vitoats
from tests.conftest import make_tiny
from tests.jobs import weights
from vitoats.cli.compress import main as compress
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.common.manifest import is_record
from vitoats.data.images import open_images
from vitoats.loading.load import load_model

QUICK = {"iterations": 4, "nsamples": 16, "threads": 1}
RECIPES = [
    {"compression": 0.6},  # OATS-H with all that it has: residual target, bias refit, measured budgets, mixed images
    {"preset": "fast", "nsamples": 16, "refit_bias": False, "seed": 7},
    {"method": "oats", "compression": 0.5, "rank_ratio": 0.25, "fused_qkv": True, "amp": True},
    {"method": "sparsegpt", "pattern": "2:4", "target": "dense", "damping": 0.1},
    {"method": "numerical", "compression": 0.3},
    {"method": "wanda", "max_mb": 0.25, "allocation": "uniform"},
]


def flags(settings):
    """Settings as flags of compress; what is no flag goes into --method-options."""
    words, options = [], []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "damping":
            options.append(f"{name}={value}")
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-"))
        else:
            words += [flag, str(value)]
    return words + ([f"--method-options={','.join(options)}"] if options else [])


def settings_of(recipe):
    known = {} if recipe.get("method") in ("sparsegpt", "wanda", "numerical") or "preset" in recipe else QUICK
    return {"nsamples": 16, "threads": 1} | known | recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.get("method", recipe.get("preset", "oats-h")))
def test_the_same_settings_give_the_same_folder_byte_for_byte(succeed, tiny_folder, flat_images, tmp_path, recipe):
    settings = settings_of(recipe)
    name = f"local-dir:{tiny_folder}"
    succeed(compress, "--model", name, "--data-dir", flat_images, "--output", tmp_path / "cli", *flags(settings))
    vitoats.compress(name, flat_images, **settings).save(tmp_path / "python")
    files = sorted(path.name for path in (tmp_path / "cli").iterdir() if not is_record(path.name))
    assert files == sorted(path.name for path in (tmp_path / "python").iterdir())
    assert filecmp.cmpfiles(tmp_path / "cli", tmp_path / "python", files, shallow=False) == (files, [], [])


@pytest.fixture(scope="module")
def small(shallow_folder, flat_images, tmp_path_factory):
    """A compressed model and the folder that it was saved to."""
    compressed = vitoats.compress(f"local-dir:{shallow_folder}", flat_images, method="oats", **QUICK)
    return compressed, compressed.save(tmp_path_factory.mktemp("small") / "out")


def test_a_model_in_memory_stays_as_it_is_and_compresses_as_by_name(small, flat_images, tmp_path):
    model = make_tiny(depth=1)
    before = copy.deepcopy(model.state_dict())
    folder = vitoats.compress(model, flat_images, method="oats", **QUICK).save(tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    same_weights(folder, small[1])


class Pictures(Dataset):
    """PIL images in the order of a folder, with labels or without."""

    def __init__(self, paths, labelled):
        self.paths, self.labelled = paths, labelled

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = Image.open(self.paths[index])
        return (image, 1) if self.labelled else image


@pytest.mark.parametrize("kind", ["pictures", "labelled pictures", "tensors", "one tensor"])
def test_images_in_memory_are_as_good_as_a_folder(small, shallow_folder, flat_images, tmp_path, kind):
    name = f"local-dir:{shallow_folder}"
    files = open_images(str(flat_images), "train", load_model(name).preprocessing.transform())
    images = {
        "pictures": Pictures(files.paths, labelled=False),
        "labelled pictures": Pictures(files.paths, labelled=True),
        "tensors": [files[i][0] for i in range(len(files))],
        "one tensor": torch.stack([files[i][0] for i in range(len(files))]),
    }[kind]
    same_weights(vitoats.compress(name, images, method="oats", **QUICK).save(tmp_path / "out"), small[1])


def same_weights(folder, other):
    a, b = weights(folder), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_was_saved_loads_and_gives_the_same_outputs(small):
    compressed, folder = small
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(vitoats.load(folder)(images), compressed.model(images))


@pytest.mark.parametrize(
    ("flag", "argument"),
    [([], {}), (["--dense"], {"form": "dense"}), (["--int8"], {"int8": True})],
    ids=["sparse", "dense", "int8"],
)
def test_an_export_is_that_of_the_command_line(succeed, small, tmp_path, flag, argument):
    _, folder = small
    succeed(export_onnx, folder, "-o", tmp_path / "cli.onnx", *flag)
    vitoats.export_onnx(folder, tmp_path / "python.onnx", **argument)
    assert filecmp.cmp(tmp_path / "cli.onnx", tmp_path / "python.onnx", shallow=False)


@pytest.mark.parametrize("argument", [{"form": "dense"}, {"int8": True}], ids=["dense", "int8"])
def test_a_model_in_memory_can_be_exported(small, tmp_path, argument):
    """A sparse one is evaluated below."""
    vitoats.export_onnx(small[0], tmp_path / "memory.onnx", **argument)
    assert (tmp_path / "memory.onnx").stat().st_size > 1000


def test_an_evaluation_is_that_of_the_command_line(succeed, small, image_tree, tmp_path):
    compressed, folder = small
    said = succeed(eval_imagenet, "--model", folder, "--data-dir", image_tree, "-j", "0")
    vitoats.export_onnx(compressed, tmp_path / "small.onnx")
    for model in (folder, compressed, tmp_path / "small.onnx"):
        found = vitoats.evaluate(model, image_tree)
        assert (found.n_images, found.correct1, found.correct5) == (24, said["n_correct1"], said["n_correct5"])
    labelled = open_images(str(image_tree), "test", compressed.loaded.preprocessing.transform())
    assert vitoats.evaluate(compressed, labelled).correct1 == said["n_correct1"]


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ({"compression": 1.5}, "compression", "`compression`"),
        ({"compression": 0.5, "speedup": 2.0}, "compression", "exclude each other"),
        ({"method": "magic"}, None, "unknown method"),
        ({"method": "wanda", "rank_ratio": 0.2}, "rank_ratio", "takes no `rank_ratio`"),
        ({"method": "wanda", "dampin": 0.2}, "dampin", "no option 'dampin'"),
        ({"method": "numerical", "target": "dense"}, "target", "`target`"),
        ({"preset": "slow"}, "preset", "no preset"),
        ({"pattern": "2:4", "max_mb": 3.0}, "max_mb", "fixes what is removed"),
        ({"pattern": "2:4", "allocation": "sensitivity"}, "allocation", "fixes"),
        ({"nsamples": 0}, "nsamples", "`nsamples`"),
        ({"batch_size": 0}, "batch_size", "`batch_size`"),
        ({"speedup": -1.0}, "speedup", "`speedup`"),
        ({"seed": -1}, "seed", "`seed`"),
        ({"target": "blok"}, "target", "block, sequential, dense, residual"),
        ({"allocation": "even"}, "allocation", "uniform"),
        ({"refit_bias": "yes"}, "refit_bias", "True or False"),
        ({"device": "banana"}, "device", "`device='cpu'`"),
    ],
)
def test_errors_speak_of_arguments(tiny_folder, flat_images, settings, field, said):
    with pytest.raises(vitoats.InputError) as caught:
        vitoats.compress(f"local-dir:{tiny_folder}", flat_images, **settings)
    assert said in str(caught.value)
    assert "--" not in str(caught.value)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(4, 3, 16, 16), "not a PIL image or a float tensor of shape [3, 32, 32]"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(0, 3, 32, 32), "no image"),
        (["a.png"], "str"),
        (iter([]), "a Dataset with a length"),
        ("/no/such/folder", "/no/such/folder"),
        (None, "give `images`"),
    ],
)
def test_images_that_cannot_be(tiny_folder, images, said):
    with pytest.raises(vitoats.InputError) as caught:
        vitoats.compress(f"local-dir:{tiny_folder}", images, method="wanda", nsamples=2)
    assert said in str(caught.value)
    assert caught.value.field == "images"


def test_what_is_no_model_is_refused(flat_images):
    with pytest.raises(vitoats.InputError, match="timm"):
        vitoats.compress(torch.nn.Linear(3, 3), flat_images)


def test_progress_and_log_are_the_callers_to_turn_on(tiny_folder, flat_images, capfd, caplog):
    told = []
    with caplog.at_level(logging.CRITICAL, "vitoats"):
        vitoats.compress(
            f"local-dir:{tiny_folder}", flat_images, method="wanda", nsamples=16, progress=lambda *step: told.append(step)
        )
    assert capfd.readouterr() == ("", "")
    assert {stage for stage, *_ in told} == {"block"}
    assert told[-1][1:] == (3, 3, "done")
