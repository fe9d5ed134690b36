"""Proves that weights are found at any level and behind any prefix, and that what does not fit is explained with a way out."""

import logging
import re
from argparse import Namespace

import pytest
import safetensors.torch
import torch

from tests.conftest import make_tiny
from vitoats.common.errors import InputError
from vitoats.loading.adaptations import shapes_of
from vitoats.loading.load import load_model
from vitoats.loading.misfit import HUB_NAMES
from vitoats.loading.readings import find_weights

import timm  # isort: skip


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, "vitoats")


def behind(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def inside_blocks(state):
    """As torch.compile and activation checkpointing of single blocks leave the names."""
    return {
        name.replace(".attn.", "._checkpoint_wrapped_module.attn.").replace("blocks.1.", "blocks.1._orig_mod."): tensor
        for name, tensor in state.items()
    }


def in_chunks(state):
    """As DINOv2's training shards the blocks."""
    return {
        re.sub(r"^blocks\.(\d+)", lambda block: f"blocks.{int(block[1]) // 2}.{block[1]}", name): t for name, t in state.items()
    }


def classifier_beside(name, state):
    """A classifier of another name beside a backbone."""
    return {key.replace("head.", f"{name}.") if key.startswith("head.") else f"backbone.{key}": t for key, t in state.items()}


def other(state):
    return {name: tensor + 1 for name, tensor in state.items()}


SAVED = {  # what is saved, and what is said about it
    "teacher": (lambda s: {"teacher": s, "epoch": 3}, "under 'teacher'"),
    "student": (lambda s: {"student": s, "args": Namespace(lr=0.1)}, "under 'student'"),
    "model_state_dict": (lambda s: {"model_state_dict": s, "optimizer": {0: {"exp_avg": torch.zeros(3)}}}, "model_state_dict"),
    "net": (lambda s: {"net": s, "acc": 93.1}, "under 'net'"),
    "two levels": (lambda s: {"checkpoint": {"ema": {"model": s}}}, "under 'checkpoint.ema.model'"),
    "Lightning": (lambda s: {"state_dict": behind("model.", s) | {"criterion.weight": torch.ones(4)}}, "behind 'model.'"),
    "backbone and more": (lambda s: {"model": behind("module.backbone.", s) | {"head.mlp.weight": torch.ones(9)}}, "backbone."),
    "compiled, then DDP": (lambda s: behind("module._orig_mod.", s), "lose 'module' and '_orig_mod'"),
    "DDP, then compiled": (lambda s: behind("_orig_mod.module.", s), "lose 'module' and '_orig_mod'"),
    "wrapped blocks": (lambda s: {"state_dict": inside_blocks(s)}, "_checkpoint_wrapped_module"),
    "four prefixes": (lambda s: {"a": behind("task.model.net.encoder.", s)}, "behind 'task.model.net.encoder.'"),
    "averaged weights win": (lambda s: {"model": other(s), "model_ema": s}, "under 'model_ema'"),
    "the teacher wins": (lambda s: behind("student.", other(s)) | behind("teacher.vit.", s), "behind 'teacher.vit.'"),
    "swa": (lambda s: behind("module.", s) | {"n_averaged": torch.tensor(3)}, "n_averaged"),
    "a list": (lambda s: [s, 3], "under '0'"),
    "DINOv2's shards": (lambda s: {"teacher": behind("backbone.", in_chunks(s))}, "lose the numbers of chunks"),
    "its classifier beside it": (lambda s: {"state_dict": classifier_beside("classifier", s)}, "have classifier.weight"),
    "Lightning's beside it": (lambda s: behind("model.", classifier_beside("fc", s)), "have model.fc.weight"),
    "by shape, not by name": (lambda s: {"ema": {k: torch.zeros(2) for k in s}, "model": s}, "under 'model'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVED)
def test_weights_are_found_and_what_was_stripped_is_said(tiny_folder, tmp_path, caplog, kind):
    save, said = SAVED[kind]
    model = make_tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    torch.save(save(model.state_dict()), tmp_path / "w.pth")
    loaded = load_model(f"local-dir:{tiny_folder}", checkpoint=tmp_path / "w.pth")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert said in caplog.text


def test_a_plain_file_says_nothing(tiny_folder, tmp_path, caplog):
    torch.save(make_tiny().state_dict(), tmp_path / "w.pth")
    load_model(f"local-dir:{tiny_folder}", checkpoint=tmp_path / "w.pth")
    assert caplog.text == ""


def test_a_choice_between_two_is_said(tiny, caplog):
    state = tiny.state_dict()
    find_weights("w.pth", {"student": dict(state), "teacher": dict(state)}, tiny)
    assert "under 'teacher' (under 'student' would fit as well)" in caplog.text


def test_a_dictionary_that_holds_itself_is_read_once(tiny):
    content: dict = {"model": tiny.state_dict()}
    content["self"] = content
    content["model"]["again"] = content
    reading = find_weights("w.pth", content, tiny)
    assert reading is not None
    assert reading.place == "model"


def test_a_projection_head_is_left_out_and_said(tmp_path, caplog):
    """MoCo's and DINO's, in the place of the classifier."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    projection = {"head.mlp.0.weight": torch.ones(8, 192), "head.mlp.0.bias": torch.ones(8)}
    torch.save({"state_dict": behind("base_encoder.", model.state_dict() | projection)}, tmp_path / "w.pth")
    loaded = load_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.pth", img_size=32)
    assert loaded.n_classes == 0
    assert "head.mlp.0.weight, head.mlp.0.bias are left out" in caplog.text


@pytest.mark.parametrize("heads", [("dino_head.last_layer", 8, 192), ("head.0", 8, 192), ("head", 8, 64), ("a.head", 4, 192)])
def test_a_layer_that_may_be_no_classifier_is_left_out(tmp_path, heads):
    name, *shape = heads
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=1)
    beside = {f"{name}.weight": torch.ones(*shape)} | ({"b.head.weight": torch.ones(*shape)} if name == "a.head" else {})
    torch.save({"state_dict": behind("backbone.", model.state_dict()) | beside}, tmp_path / "w.pth")
    kwargs = {"depth": 1}
    assert load_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.pth", img_size=32, model_kwargs=kwargs).n_classes == 0


def test_positions_that_fit_the_image_size_are_taken_as_they_are(tmp_path, caplog):
    """DINOv2 trained at another size than Meta's, with its own way of resizing."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, depth=1)
    torch.save({"teacher": behind("backbone.", model.state_dict())}, tmp_path / "w.pth")
    loaded = load_model("dinov2_vits14", checkpoint=tmp_path / "w.pth", model_kwargs={"depth": 1})
    assert torch.equal(loaded.timm_model.pos_embed, model.pos_embed)
    assert "resized" not in caplog.text + loaded.weights


# ---- what does not fit


def refused(state, tmp_path, name="vit_tiny_patch16_224", **settings):
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, str(tmp_path / "w.safetensors"))
    with pytest.raises(InputError) as error:
        load_model(name, checkpoint=tmp_path / "w.safetensors", **settings)
    assert len(str(error.value)) < 700
    return str(error.value)


VARIANTS = {
    "global_pool=avg": {"global_pool": "avg"},
    "init_values=1e-05": {"init_values": 1e-5},
    "reg_tokens=4": {"reg_tokens": 4},
    "reg_tokens=4 no_embed_class=True": {"reg_tokens": 4, "no_embed_class": True},
    "qk_norm=True": {"qk_norm": True},
    "qkv_bias=False": {"qkv_bias": False},
    "pre_norm=True": {"pre_norm": True},
    "depth=2": {"depth": 2},
}


@pytest.mark.parametrize("said", ["global_pool=avg", "init_values=1e-05", "reg_tokens=4", "reg_tokens=4 no_embed_class=True",
                                  "qk_norm=True", "qkv_bias=False", "pre_norm=True", "depth=2"])  # fmt: skip
def test_arguments_that_would_fit_are_named_and_do_fit(tmp_path, said):
    small = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=3, **small | VARIANTS[said]).eval()
    message = refused(model.state_dict(), tmp_path, img_size=48, model_kwargs=small)
    assert message.endswith(f"add `model_kwargs` {said}")
    kwargs = small | VARIANTS[said]
    loaded = load_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.safetensors", img_size=48, model_kwargs=kwargs)
    images = torch.randn(1, 3, 48, 48)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images), model(images))


@pytest.mark.parametrize(
    ("held", "asked", "fitting"),
    [
        ("vit_small_patch16_224", "vit_tiny_patch16_224", "vit_small_patch16_224"),
        ("vit_small_patch14_reg4_dinov2", "dinov2_vits14", "dinov2_vits14_reg"),
        ("vit_small_patch16_dinov3_qkvb", "vit_small_patch16_224", "dinov3_vits16"),
    ],
)
def test_models_that_would_fit_are_named(tmp_path, held, asked, fitting):
    message = refused(timm.create_model(held).state_dict(), tmp_path, asked)
    assert f"do not fit {asked}: " in message
    assert fitting in message.partition("they would fit ")[2]


def test_positions_of_a_rectangle_need_its_size(tmp_path):
    small = {"depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), num_classes=3, **small).eval()
    message = refused(model.state_dict(), tmp_path, model_kwargs=small)
    assert message.endswith("their 8 positions are for no square image: give `img_size` as height x width")
    file = tmp_path / "w.safetensors"
    loaded = load_model("vit_tiny_patch16_224", checkpoint=file, img_size=(32, 64), model_kwargs=small)
    images = torch.randn(1, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images), model(images))


def test_weights_quantized_without_scales_are_refused(tmp_path):
    state = {name: (100 * tensor).to(torch.int8) for name, tensor in make_tiny().state_dict().items()}
    assert "has whole numbers for the weight blocks.0." in refused(state, tmp_path)


def test_the_first_names_that_differ_are_shown(tmp_path):
    state = {name.replace("blocks.2.", "stages.2."): tensor for name, tensor in make_tiny().state_dict().items()}
    message = refused(state, tmp_path)
    assert "missing blocks.2.norm1.weight, blocks.2.norm1.bias, blocks.2.attn.qkv.weight and " in message
    assert "unexpected stages.2." in message
    assert "and 9 more; of another shape" in message
    assert "of another shape cls_token [1, 1, 48] for [1, 1, 192]" in message


# ---- arguments


def test_arguments_are_kept_in_the_folder(tmp_path):
    from vitoats.loading.checkpoint import load_checkpoint, save_checkpoint

    kwargs = {"global_pool": "avg", "depth": 2, "reg_tokens": 3}
    loaded = load_model("vit_tiny_patch16_224", random_weights=True, img_size=32, model_kwargs=kwargs)
    save_checkpoint(loaded, tmp_path / "out", {"model": loaded.name, "method": "none"})
    again = load_checkpoint(tmp_path / "out").model
    assert shapes_of(again) == shapes_of(loaded.model)
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(images), loaded.model(images))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"globalpool": "avg"}, "global_pool"),
        ({"pretrained_cfg": {"url": "x"}}, "does not take the argument 'pretrained_cfg'"),
        ({"img_size": 48}, "give `img_size`"),
        ({"global_pool": "nonsense"}, "cannot be built"),
        ({"depth": {"a": 1}}, "takes no such depth"),
        ({"checkpoint_path": "/etc/passwd"}, "does not take"),
        ({"in_chans": 5}, "use a model of 1, 3 or 4"),
    ],
)
def test_arguments_that_cannot_be_are_refused(kwargs, said):
    with pytest.raises(InputError, match=r"`model_kwargs`|channels") as error:
        load_model("vit_tiny_patch16_224", random_weights=True, model_kwargs=kwargs)
    assert said in str(error.value)


def test_a_number_of_classes_that_would_be_random_is_refused(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, depth=1).state_dict()
    kwargs = {"depth": 1, "num_classes": 5}
    assert "has 7 classes, not 5" in refused(state, tmp_path, img_size=32, model_kwargs=kwargs)
    file, kwargs = tmp_path / "w.safetensors", {"depth": 1, "num_classes": 0}
    assert load_model("vit_tiny_patch16_224", checkpoint=file, img_size=32, model_kwargs=kwargs).n_classes == 0


@pytest.mark.parametrize("model", ["dinov2s_derived", "folder"])
def test_models_with_their_own_weights_take_no_arguments(plain, model):
    with pytest.raises(InputError, match="leave `model_kwargs` out"):
        load_model(str(plain) if model == "folder" else model, model_kwargs={"depth": 2})


# ---- DINOv3


def official(model):
    """A DINOv3 model's weights as Meta's files name them."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        for ours, theirs in (("fc1_g", "w1"), ("fc1_x", "w2"), ("mlp.fc2", "mlp.w3")):
            name = name.replace(ours, theirs) if any(".fc1_g." in key for key in model.state_dict()) else name
        if ".q_bias" in name:
            v = model.state_dict()[name.replace("q_bias", "v_bias")]
            name, tensor = name.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.full_like(tensor, float("nan")), v])
            state[name + "_mask"] = torch.ones_like(tensor)
        if ".v_bias" not in name and "rope" not in name:
            state[name] = tensor
    width = model.embed_dim
    return state | {"mask_token": torch.zeros(1, width), "rope_embed.periods": torch.zeros(16)}


@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov3_vits16plus"])
def test_official_dinov3_files_give_the_models_outputs(tmp_path, name):
    torch.manual_seed(0)
    model = timm.create_model(HUB_NAMES[name].timm_name.partition(".")[0], depth=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    torch.save(official(model), tmp_path / "w.pth")
    loaded = load_model(name, checkpoint=tmp_path / "w.pth", model_kwargs={"depth": 2})
    assert (loaded.preprocessing.img_size, loaded.preprocessing.crop_pct) == (256, 1.0)
    images = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images), model(images))


def test_biases_of_dinov3_are_not_lost_silently(tmp_path):
    """timm leaves them out for a model that has none."""
    small = {"depth": 4}
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", **small)
    state = official(model)
    zero = {name: torch.zeros_like(tensor) if name.endswith("qkv.bias") else tensor for name, tensor in state.items()}
    torch.save(zero, tmp_path / "zero.pth")
    assert load_model("vit_small_patch16_dinov3", checkpoint=tmp_path / "zero.pth", model_kwargs=small).n_classes == 0
    state["blocks.3.attn.qkv.bias"][-1] = 1
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match="biases of q and v"):
        load_model("vit_small_patch16_dinov3", checkpoint=tmp_path / "w.pth", model_kwargs=small)


def test_all_hub_names_are_models_of_timm():
    for named in HUB_NAMES.values():
        assert timm.get_pretrained_cfg(named.timm_name) is not None
