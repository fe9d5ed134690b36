"""The configurations that timm itself writes are read as they were; the allow-list is that of the architecture."""

import json
import threading

import pytest
import torch
from torch import nn

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from tests.models.test_architectures import FAST, SLOW
from vitoats.common.errors import InputError
from vitoats.data.transforms import Preprocessing
from vitoats.loading.sketch import Held, create, sketch
from vitoats.loading.timm_config import allowed_arguments, read_config

import timm  # isort: skip
from timm.data.model_config import resolve_input_data_config  # isort: skip
from timm.models._hub import save_config_for_hf  # isort: skip


def saved(model, folder):
    save_config_for_hf(model, str(folder / "config.json"))
    return read_config(folder)


@pytest.mark.parametrize(("name", "arguments", "_n"), [*FAST, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)])
def test_what_timm_saves_is_read(name, arguments, _n, tmp_path):
    model = timm.create_model(name, num_classes=5, drop_rate=0.1, **arguments)
    config = saved(model, tmp_path)
    assert config.architecture == name
    again = create(config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert resolve_input_data_config(again, use_test_size=True) == resolve_input_data_config(model, use_test_size=True)


@pytest.mark.slow
def test_architectures_of_all_of_timm_pass(tmp_path):
    """Every 25th, on the meta device: its own arguments and preprocessing are among those that are allowed."""
    for name in timm.list_models()[::25]:
        with torch.device("meta"):
            model = timm.create_model(name)
        config = saved(model, tmp_path)
        assert config.architecture == name
        input_size = model.pretrained_cfg["input_size"]
        if input_size[0] == 3 and input_size[1] == input_size[2]:
            Preprocessing.from_timm(resolve_input_data_config(model, use_test_size=True))


@pytest.mark.parametrize(("name", "value"), [("num_heads", -8), ("depth", -8), ("patch_size", True), ("num_classes", -8)])
def test_values_of_which_timm_builds_a_model_that_does_not_run_are_refused(name, value, tmp_path):
    save_config_for_hf(timm.create_model("vit_tiny_patch16_224"), str(tmp_path / "config.json"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] = {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"gives {name} a value that no model takes"):
        read_config(tmp_path)


def test_nothing_that_timms_factory_takes_is_allowed():
    forbidden = {
        "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "model_cfg", "feature_cfg",
        "custom_load", "features_only", "pruned", "kwargs", "self", "device", "dtype", "pretrained_model_args",
    }  # fmt: skip
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_base_patch14_224", "resnet18", "resnext26ts"):
        allowed = allowed_arguments(name).keys()
        assert not allowed & forbidden
        assert {"num_classes", "in_chans", "global_pool"} <= allowed
    assert {"embed_dim", "depth", "num_heads", "mlp_ratio", "reg_tokens"} <= allowed_arguments("vit_tiny_patch16_224").keys()
    assert "stem_chs" in allowed_arguments("resnext26ts")  # a field of its cfg


def test_a_sketch_takes_no_memory_and_is_stopped_early(tiny, tmp_path):
    config = saved(tiny, tmp_path)
    found = sketch(config, Held(200, 10**6))
    assert all(t.device.type == "meta" for t in (*found.parameters(), *found.buffers()))
    with pytest.raises(InputError, match="far larger"):
        sketch(config, Held(1, 10**9), depth=300)
    with pytest.raises(InputError, match="far larger"):
        sketch(config, Held(1000, 10**5), embed_dim=30_000)
    assert isinstance(nn.Linear(10_000, 10).weight, nn.Parameter)  # nothing is counted any more


def test_a_sketch_counts_what_its_own_thread_builds(tiny, tmp_path):
    config, made, stop = saved(tiny, tmp_path), [], threading.Event()

    def others():
        while not stop.is_set():
            made.append(nn.Linear(3, 3).weight.device.type)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(5):
            sketch(config, Held(30, 10**6))
    finally:
        stop.set()
        thread.join()
    assert set(made) == {"cpu"}
