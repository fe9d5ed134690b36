"""Proves that DINOv2 with linear heads is what Meta and transformers run, and that heads that do not belong are refused.

transformers' Dinov2 models are the independent reference: random weights, renamed as Meta's files have them. Positions are
compared with transformers, and for Meta's own way with bicubic interpolation written out as sums in float64.
"""

import math

import pytest
import torch
import transformers

from tests.conftest import TINY
from tests.loading.files import BAD_FILES, refusal, write_bad, write_checkpoint
from vitoats.common.errors import InputError
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.head_files import HeadFile, attach_head, load_head, same_model, save_head
from vitoats.loading.load import load_model
from vitoats.models.heads import HeadInfo, features, most_layers, width
from vitoats.models.positions import resample

import timm  # isort: skip
from timm.models import save_for_hf  # isort: skip

WIDTH, DEPTH, HEADS, CLASSES = 48, 5, 3, 10
KINDS = ("plain", "registers")


# ---- transformers as the reference


def reference(kind):
    """A narrow classifier of transformers with random weights in every parameter, trained (so to say) at 518 px."""
    settings = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": 518, "patch_size": 14,
        "num_labels": CLASSES,
    }  # fmt: skip
    if kind == "plain":
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**settings))
    else:
        config = transformers.Dinov2WithRegistersConfig(**settings, num_register_tokens=4)
        model = transformers.Dinov2WithRegistersForImageClassification(config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * (0.5 if "embeddings" in name or parameter.ndim == 1 else 0.15)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model.eval()


def as_meta(model):
    """The backbone's weights by the names in Meta's files."""
    embeddings = {
        "cls_token": "cls_token", "mask_token": "mask_token", "position_embeddings": "pos_embed",
        "register_tokens": "register_tokens", "patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "patch_embeddings.projection.bias": "patch_embed.proj.bias",
    }  # fmt: skip
    inside = {"attention.o_proj": "attn.proj", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
    theirs = {k.split(".", 1)[1]: v for k, v in model.state_dict().items() if not k.startswith("classifier")}
    state = {}
    for key, value in theirs.items():
        if key.startswith("embeddings."):
            state[embeddings[key.removeprefix("embeddings.")]] = value
        elif key.startswith("layernorm."):
            state[key.replace("layernorm", "norm")] = value
        else:
            block = key.replace("encoder.layer.", "blocks.")
            if ".attention.q_proj." in block:
                parts = [theirs[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                state[block.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
            elif key.split(".")[-2] not in ("k_proj", "v_proj"):
                for old, new in inside.items():
                    block = block.replace(old, new)
                state[block] = value
    return state


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each kind: transformers' model, its backbone as a file of Meta's, and a timm folder of that architecture."""
    made = {}
    for kind, architecture in zip(KINDS, ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"), strict=True):
        root = tmp_path_factory.mktemp(kind)
        model = reference(kind)
        narrow = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}
        save_for_hf(timm.create_model(architecture, **narrow), str(root / "timm"))
        made[kind] = model, write_checkpoint(as_meta(model), root / "pretrain.pth"), f"local-dir:{root / 'timm'}"
    return made


def image_batch(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [224, 98, 518])
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_head_gives_transformers_logits(folders, tmp_path, kind, size):
    model, weights, name = folders[kind]
    head = write_checkpoint({"weight": model.classifier.weight.data, "bias": model.classifier.bias.data}, tmp_path / "h.pth")
    ours = load_model(name, checkpoint=weights, img_size=size, pos_resample="hf", head=head)
    assert ours.model.info.layers == 1  # by the head's width
    with torch.inference_mode():
        theirs = model(pixel_values=image_batch(size), output_hidden_states=True)
        torch.testing.assert_close(ours.model(image_batch(size)), theirs.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [224, 98])
@pytest.mark.parametrize("kind", KINDS)
def test_four_layer_head_takes_the_class_tokens_of_the_last_four_blocks(folders, tmp_path, kind, size):
    model, weights, name = folders[kind]
    tensors = head_tensors(5 * WIDTH, CLASSES)
    tensors["weight"] *= 0.1
    head = write_checkpoint(tensors, tmp_path / "h.pth")
    ours = load_model(name, checkpoint=weights, img_size=size, pos_resample="hf", head=head)
    assert ours.model.info.layers == 4
    inner = model.dinov2 if kind == "plain" else model.dinov2_with_registers
    with torch.inference_mode():
        hidden = inner(image_batch(size), output_hidden_states=True).hidden_states[-4:]
        normed = [inner.layernorm(tokens) for tokens in hidden]
        patches = normed[-1][:, 1 if kind == "plain" else 5 :]
        seen = torch.cat([*(tokens[:, 0] for tokens in normed), patches.mean(dim=1)], dim=1)
        torch.testing.assert_close(features(ours.timm_model, image_batch(size), 4), seen, rtol=1e-5, atol=1e-5)
        logits = seen @ tensors["weight"].T + tensors["bias"]
        torch.testing.assert_close(ours.model(image_batch(size)), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_ways_differ_where_they_should(folders, kind):
    """Meta's and transformers' are one with registers; timm's is theirs there, and differs from both without."""
    _, weights, name = folders[kind]
    seen = {}
    with torch.inference_mode():
        for way in ("official", "hf", "timm"):
            model = load_model(name, checkpoint=weights, img_size=224, pos_resample=way).model
            seen[way] = model.forward_features(image_batch(224))
    same = {way: torch.allclose(seen[way], seen["hf"], rtol=1e-4, atol=1e-4) for way in ("official", "timm")}
    assert same == {"official": kind == "registers", "timm": kind == "registers"}


def test_hub_names_resize_as_meta_does_unless_told_otherwise(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    state["pos_embed"] = torch.randn(1, 1 + 37 * 37, 384)
    path = write_checkpoint(state | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14_pretrain.pth")
    for flags, way in (({}, "official"), ({"pos_resample": "hf"}, "hf"), ({"pos_resample": "timm"}, "timm")):
        loaded = load_model("dinov2_vits14", checkpoint=path, **flags)
        expected = resample(state["pos_embed"], (37, 37), (16, 16), way, prefix=1, registers=False)
        torch.testing.assert_close(loaded.timm_model.pos_embed.data, expected, rtol=1e-5, atol=1e-5)
        assert loaded.preprocessing.img_size == 224


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_folder_keeps_its_positions_and_its_head(folders, tmp_path, kind):
    _, weights, name = folders[kind]
    head = write_checkpoint(head_tensors(5 * WIDTH, CLASSES), tmp_path / "h.pth")
    loaded = load_model(name, checkpoint=weights, img_size=98, pos_resample="official", head=head)
    save_checkpoint(loaded, tmp_path / "folder", {"model": "dinov2_vits14"})
    again = load_model(str(tmp_path / "folder"))
    assert (again.source, again.preprocessing.img_size) == ("dinov2_vits14", 98)
    assert (again.model.info.layers, again.model.info.img_size) == (4, 98)
    with torch.inference_mode():
        assert torch.equal(again.model(image_batch(98)), loaded.model(image_batch(98)))
    assert "`pos_resample`" in refusal(str(tmp_path / "folder"), pos_resample="hf")


# ---- positions, in float64


def cubic(x, a):
    """Keys' kernel."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights_1d(old, new, scale, antialias):
    """The matrix [new, old] of a bicubic resize; ``scale`` is new pixels for each old one."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) / scale - 0.5
        if antialias:  # a wider kernel where the grid shrinks; what lies outside is left out
            stretch = max(1 / scale, 1.0)
            row = torch.tensor([cubic((j - centre) / stretch, -0.5) for j in range(old)], dtype=torch.float64)
            matrix[i] = row / row.sum()
        else:  # four taps; what lies outside is the border
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                matrix[i, min(max(j, 0), old - 1)] += cubic(j - centre, -0.75)
    return matrix


@pytest.mark.parametrize("grid", [16, 7, 32, 38, 74])
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("way", ["official", "hf", "timm"])
def test_positions_in_float64(way, registers, grid):
    old, prefix = 37, 0 if registers else 1
    positions = torch.randn(1, prefix + old * old, 6, generator=torch.Generator().manual_seed(grid))
    # Meta's settings: offset 0.1 and no antialiasing; with registers no offset and antialiasing
    offset = 0.1 if way == "official" and not registers else 0.0
    matrix = weights_1d(old, grid, (grid + offset) / old, antialias=registers or way == "timm")
    patches = positions[0, prefix:].double().reshape(old, old, 6)
    expected = torch.einsum("iy,jx,yxd->ijd", matrix, matrix, patches).reshape(-1, 6)
    found = resample(positions, (old, old), (grid, grid), way, prefix=prefix, registers=registers)[0]
    assert torch.equal(found[:prefix], positions[0, :prefix])
    torch.testing.assert_close(found[prefix:].double(), expected, rtol=0, atol=2e-5)


def test_positions_of_the_same_size_stay():
    positions = torch.randn(1, 1 + 37 * 37, 4)
    assert all(
        torch.equal(resample(positions, (37, 37), (37, 37), way, prefix=1, registers=False), positions)
        for way in ("official", "hf")
    )


def test_positions_that_were_resized_before_are_refused(folders, tmp_path):
    model, _, name = folders["plain"]
    state = as_meta(model)
    state["pos_embed"] = resample(state["pos_embed"], (37, 37), (16, 16), "timm", prefix=1, registers=False)
    path = write_checkpoint(state, tmp_path / "small.pth")
    assert "`pos_resample='timm'`" in refusal(name, checkpoint=path, img_size=224, pos_resample="official")
    load_model(name, checkpoint=path, img_size=224, pos_resample="timm")


# ---- heads


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone") / "model"
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 0, "depth": 5})
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def head_tensors(features_wide, classes=4, bias=True):
    generator = torch.Generator().manual_seed(5)
    tensors = {"weight": torch.randn(classes, features_wide, generator=generator)}
    return tensors | ({"bias": torch.randn(classes, generator=generator)} if bias else {})


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("layers", [1, 4])
def test_a_head_acts_on_class_tokens_and_mean_patches(backbone_folder, tmp_path, layers, ending):
    tensors = head_tensors((layers + 1) * 48)
    path = write_checkpoint(tensors, tmp_path / f"head{ending}")
    loaded = load_model(f"local-dir:{backbone_folder}", head=path, head_layers=layers if ending == ".pth" else None)
    backbone = loaded.timm_model
    images = torch.randn(2, 3, 32, 32)
    after: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _a, output: after.append(backbone.norm(output))) for b in backbone.blocks]
    with torch.inference_mode():
        logits = loaded.model(images)
        after.clear()
        backbone.forward_features(images)
        for hook in hooks:
            hook.remove()
        seen = torch.cat([*(tokens[:, 0] for tokens in after[-layers:]), after[-1][:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(features(backbone, images, layers), seen)
    torch.testing.assert_close(logits, seen @ tensors["weight"].T + tensors["bias"], rtol=1e-4, atol=1e-4)


def test_a_head_file_says_how_many_layers_it_takes(backbone_folder, tmp_path):
    tensors = head_tensors(5 * 48)
    save_head(tmp_path / "h.safetensors", tensors["weight"], tensors["bias"], HeadInfo("x", 32, 4, ("a", "b", "c", "d")))
    loaded = load_model(f"local-dir:{backbone_folder}", head=tmp_path / "h.safetensors")
    assert loaded.model.info.layers == 4
    assert loaded.model.info.classes == ("a", "b", "c", "d")
    with pytest.raises(InputError, match="`head_layers`"):
        load_model(f"local-dir:{backbone_folder}", head=tmp_path / "h.safetensors", head_layers=1)


BAD_HEADS = {
    "other width": (head_tensors(10), "10 features"),
    "between two and three layers": (head_tensors(120), "120 features"),
    "bias of another length": ({**head_tensors(96), "bias": torch.zeros(7)}, "bias"),
    "flat weight": ({"weight": torch.zeros(96), "bias": torch.zeros(4)}, "weight"),
    "not finite": ({**head_tensors(96), "bias": torch.full((4,), float("nan"))}, "not finite"),
}


@pytest.mark.parametrize("kind", BAD_HEADS)
def test_heads_that_do_not_fit(backbone_folder, tmp_path, kind):
    tensors, said = BAD_HEADS[kind]
    path = write_checkpoint(tensors, tmp_path / "head.safetensors")
    message = refusal(f"local-dir:{backbone_folder}", head=path)
    assert said in message
    assert str(path) in message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_head_files_are_named_and_never_run(backbone_folder, tmp_path, kind):
    path, marker = tmp_path / "head.pth", tmp_path / "this was run"
    write_bad(kind, path, marker)
    message = refusal(f"local-dir:{backbone_folder}", head=path)
    assert not marker.exists()
    assert str(path) in message
    assert "weights_only=False" not in message


def test_a_head_for_more_layers_than_there_are(tmp_path):
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 0}), str(tmp_path / "m"))  # 3 blocks
    path = write_checkpoint(head_tensors(5 * 48), tmp_path / "head.pth")
    assert str(path) in refusal(f"local-dir:{tmp_path / 'm'}", head=path, head_layers=4)


def test_a_head_on_a_classifier_is_refused(tiny_folder, tmp_path):
    path = write_checkpoint(head_tensors(96), tmp_path / "head.pth")
    assert "`head`" in refusal(f"local-dir:{tiny_folder}", head=path)


# ---- what a head was made for


@pytest.mark.parametrize(
    ("file", "backbone", "layers"),
    [
        ("dinov2_vitb14_linear_head.pth", "dinov2_vitb14", 1),
        ("dinov2_vitb14_linear4_head.pth", "dinov2_vitb14", 4),
        ("dinov2_vits14_reg4_linear_head.pth", "dinov2_vits14_reg", 1),
        ("dinov2_vitg14_reg4_linear4_head.pth", "dinov2_vitg14_reg", 4),
    ],
)
def test_metas_files_say_by_their_name_what_they_are_for(tmp_path, file, backbone, layers):
    _, info = load_head(write_checkpoint(head_tensors(96), tmp_path / file))
    assert (info.backbone, info.layers, info.patch_mean) == (backbone, layers, True)


def test_a_head_of_meta_for_another_backbone_is_refused(tmp_path):
    """The widths are the same with and without registers, so the product would run, and be wrong."""
    path = write_checkpoint(head_tensors(2 * 384, 1000), tmp_path / "dinov2_vits14_reg4_linear_head.pth")
    message = refusal("dinov2_vits14", random_weights=True, head=path)
    assert "made for dinov2_vits14_reg, not for dinov2_vits14" in message
    for name in ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2"):
        assert load_model(name, random_weights=True, head=path, img_size=224).n_classes == 1000


def test_metas_head_at_another_size_is_a_warning(tmp_path, caplog):
    path = write_checkpoint(head_tensors(2 * 384, 1000), tmp_path / "dinov2_vits14_linear_head.pth")
    load_model("dinov2_vits14", random_weights=True, head=path)
    assert "224 px" not in caplog.text
    load_model("dinov2_vits14", random_weights=True, head=path, img_size=98)
    assert "224 px, not 98" in caplog.text


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("dinov2_vits14", "dinov2_vits14", True),
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m", True),
        ("dinov2_vits14", "vit_small_patch14_dinov2", True),
        ("dinov2_vits14", "dinov2_vitb14", False),
        ("dinov2_vits14", "dinov2_vits14_reg", False),
        ("dinov2_vits14", "dinov2s_derived", False),
        ("deit_small_patch16_224.fb_in1k", "deit_small_patch16_224.other", False),
        # folders move, and heads may not say
        ("local-dir:/a", "local-dir:/b", True),
        ("runs/x", "dinov2_vits14", True),
        ("", "dinov2_vits14", True),
    ],
)
def test_names_of_the_same_model(one, other, same):
    assert same_model(one, other) is same_model(other, one) is same


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (HeadInfo("dinov2_vits14_reg", 28), "made for dinov2_vits14_reg, not for vit_small_patch14_dinov2"),
        (HeadInfo("dinov2_vits14", 224), "224 px, not 28"),
        (HeadInfo("dinov2_vits14", 28, classes=("a", "b")), "does not say rightly"),
        (HeadInfo("dinov2_vits14", 28, layers=4), "4 layer(s) of this backbone give 1920"),
        (HeadInfo("dinov2_vits14", 28, patch_mean=False), "1 layer(s) of this backbone give 384"),
    ],
)
def test_our_heads_for_something_else_are_refused(tmp_path, info, said):
    tensors = head_tensors(2 * 384)
    save_head(tmp_path / "h.safetensors", tensors["weight"], tensors["bias"], info)
    message = refusal("vit_small_patch14_dinov2", random_weights=True, img_size=28, head=tmp_path / "h.safetensors")
    assert said in message


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}),
        ("vit_base_patch16_siglip_gap_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),  # its first token is a patch
    ],
)
def test_a_head_on_a_backbone_without_a_class_token_is_refused(tmp_path, name, arguments):
    backbone = timm.create_model(name, img_size=32, num_classes=0, **arguments)
    save_head(tmp_path / "head.safetensors", torch.randn(3, 96), torch.zeros(3), HeadInfo())
    with pytest.raises(InputError, match="no class token"):
        attach_head(backbone, HeadFile(tmp_path / "head.safetensors"), source=name, img_size=32)


@pytest.mark.parametrize(
    ("name", "arguments", "layers"),
    [
        # class token, class and register tokens: 4 layers
        ("vit_small_patch16_dinov3", {"embed_dim": 48, "depth": 4, "num_heads": 2}, (1, 4)),
        ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 48, "depth": 4, "num_heads": 2}, (1, 4)),
        ("beit_base_patch16_224", {"embed_dim": 48, "depth": 4, "num_heads": 2}, (1, 4)),
        ("cait_xxs24_224", {"embed_dim": 48, "depth": 4, "num_heads": 2}, (1,)),  # only the last blocks have a class token
        # none: pooled features
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}, (0,)),
        ("vit_base_patch16_siglip_gap_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}, (0,)),
        ("convnext_tiny", {"img_size": None, "depths": (1, 1, 1, 1), "dims": (16, 16, 32, 48)}, (0,)),
    ],
)
def test_heads_fit_all_that_a_probe_can_be_trained_on(tmp_path, name, arguments, layers):
    arguments = {key: value for key, value in ({"img_size": 32} | arguments).items() if value}
    backbone = timm.create_model(name, num_classes=0, **arguments).eval()
    size = arguments.get("img_size", 32)
    assert most_layers(backbone) == max(layers)
    images = torch.randn(2, 3, size, size)
    for n in layers:
        weight = torch.randn(3, (n + 1) * width(backbone))
        save_head(tmp_path / f"{n}.safetensors", weight, torch.zeros(3), HeadInfo(layers=n))
        made = attach_head(backbone, HeadFile(tmp_path / f"{n}.safetensors"), source=name, img_size=size)
        seen = features(backbone, images, n)
        assert torch.allclose(made(images), seen @ weight.T, atol=1e-4)
        last = backbone.forward_features(images)
        if n:
            prefix = backbone.num_prefix_tokens
            assert torch.allclose(seen[:, -2 * 48 : -48], last[:, 0], atol=1e-5)
            assert torch.allclose(seen[:, -48:], last[:, prefix:].mean(dim=1), atol=1e-5)
    save_head(tmp_path / "x.safetensors", torch.randn(3, 10 * 48), torch.zeros(3), HeadInfo(layers=9))
    with pytest.raises(InputError, match="class token"):
        attach_head(backbone, HeadFile(tmp_path / "x.safetensors"), source=name, img_size=size)
