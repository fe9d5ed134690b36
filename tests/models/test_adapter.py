"""Blocks and linear layers are found by structure, over many timm architectures; what does not fit is refused."""

import pytest
import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError
from vitoats.models.adapter import adapt
from vitoats.models.blocks import LinearLayer
from vitoats.models.inputs import ImageInputs

import timm  # isort: skip

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def create(name: str, img_size: int, **kwargs) -> torch.nn.Module:
    return timm.create_model(name, img_size=img_size, **kwargs).eval()


@pytest.mark.parametrize(
    ("name", "img_size", "kwargs", "per_block"),
    [
        # plain ViT, DeiT (also distilled and with layer scale), DINOv2 with and without registers
        ("vit_base_patch16_224", 32, SMALL, 4),
        ("deit_tiny_patch16_224", 32, SMALL, 4),
        ("deit_tiny_distilled_patch16_224", 32, SMALL, 4),
        ("deit3_small_patch16_224", 32, SMALL, 4),
        ("vit_small_patch14_dinov2", 28, SMALL, 4),
        ("vit_small_patch14_reg4_dinov2", 28, SMALL, 4),
        # SwiGLU in one matrix, as in DINOv2-giant
        ("vit_giant_patch14_dinov2", 28, SMALL, 4),
        # CLIP and SigLIP image towers, averaged pooling
        ("vit_base_patch32_clip_224", 64, SMALL, 4),
        ("vit_base_patch16_siglip_224", 32, SMALL, 4),
        ("vit_small_patch16_36x1_224", 32, SMALL, 4),
        # rotary embedding passed to each block; SwiGLU in three matrices; separate q, k, v
        ("eva02_tiny_patch14_224", 28, SMALL, None),
    ],
)
def test_chain_of_blocks(name, img_size, kwargs, per_block):
    model = create(name, img_size, **kwargs)
    adapter = adapt(model, ImageInputs(img_size))
    assert [block.name for block in adapter.blocks] == [f"blocks.{i}" for i in range(len(model.blocks))]
    if per_block:
        assert [len(block.linears) for block in adapter.blocks] == [per_block] * len(model.blocks)
        assert [(x.name.split(".", 2)[2], x.parts) for x in adapter.blocks[0].linears] == [
            ("attn.qkv", 3),
            ("attn.proj", 1),
            ("mlp.fc1", 1),
            ("mlp.fc2", 1),
        ]
    # running block after block gives what the model gives
    images = torch.randn(3, 3, img_size, img_size)
    reached = {}
    handle = model.blocks[-1].register_forward_hook(lambda *args: reached.update(last=args[2]))
    with torch.inference_mode():
        model(images)
        handle.remove()
        hidden = adapter.first_hidden(images)
        for block in adapter.blocks:
            assert hidden.shape[1:] == block.shape_before
            hidden = block.run(hidden)
    assert torch.equal(hidden, reached["last"])


def test_every_linear_is_either_compressed_or_skipped_with_a_reason():
    model = create("vit_base_patch16_224", 32, num_classes=7, **SMALL)
    adapter = adapt(model, ImageInputs(32))
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {x.name for x in adapter.linears}
    assert chosen.isdisjoint(name for name, _ in adapter.skipped)
    assert chosen | {name for name, _ in adapter.skipped} == linears | {"patch_embed.proj"}
    assert ("head", "outside the blocks") in adapter.skipped


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva_giant_patch14_224", "swinv2_tiny_window8_256"])
def test_a_fused_qkv_with_its_bias_apart_is_called(name):
    """timm multiplies by such a layer's weight itself, so that a layer put in its place would do nothing."""
    size = 28 if "14" in name else 32
    stages = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
    model = create(name, size, **(stages if "swin" in name else SMALL))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    images = torch.randn(2, 3, size, size)
    before = model(images)
    adapter = adapt(model, ImageInputs(size))
    assert torch.allclose(model(images), before, rtol=1e-3, atol=1e-4)
    assert adapter.linears[0] == LinearLayer(model, f"{adapter.blocks[0].name}.attn.qkv", 3)
    adapter.linears[0].module.weight.data.zero_()
    assert not torch.allclose(model(images), before, atol=1e-3)


def test_a_weight_that_is_used_directly_is_skipped(tiny):
    def multiply(x):
        return torch.nn.functional.linear(x, tiny.blocks[0].mlp.fc1.weight)

    tiny.blocks[0].mlp.forward = lambda x: tiny.blocks[0].mlp.fc2(multiply(x))
    adapter = adapt(tiny, ImageInputs(32))
    assert ("blocks.0.mlp.fc1", "its weight is used directly, not by calling the layer") in adapter.skipped
    assert [x.name for x in adapter.blocks[0].linears] == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc2"]


STAGED = [
    ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}),
    ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}),
    ("hiera_tiny_224", {"embed_dim": 24, "num_heads": 1, "stages": (1, 2), "q_pool": 1}),
]


@pytest.mark.parametrize(("name", "kwargs"), STAGED)
def test_stages_are_one_chain(name, kwargs):
    """Swin has a module between its stages, Hiera's blocks change the shape themselves."""
    model = create(name, 32, **kwargs)
    adapter = adapt(model, ImageInputs(32))
    last = adapter.blocks[-1].module
    reached = {}
    handle = last.register_forward_hook(lambda *args: reached.update(last=args[2]))
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        model(images)
        handle.remove()
        hidden = adapter.first_hidden(images)
        for block in adapter.blocks:
            assert hidden.shape[1:] == block.shape_before
            hidden = block.run(hidden)
            assert hidden.shape[1:] == block.shape_after
    assert torch.equal(hidden, reached["last"])
    assert len({block.shape_before for block in adapter.blocks}) == 2
    if name.startswith("swin"):
        assert [block.name for block in adapter.blocks] == [
            "layers.0.blocks.0",
            "layers.1.downsample",
            "layers.1.blocks.0",
            "layers.1.blocks.1",
        ]
        assert [x.name for x in adapter.blocks[1].linears] == ["layers.1.downsample.reduction"]


def test_layers_that_see_no_image_are_skipped():
    """Swin v2 makes its relative positions with an MLP on coordinates."""
    adapter = adapt(create(*STAGED[1][:1], 32, **STAGED[1][1]), ImageInputs(32))
    assert ("layers.0.blocks.0.attn.cpb_mlp.0", "its input is the same for all images") in adapter.skipped
    assert not [x.name for x in adapter.linears if "cpb" in x.name]


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("resnet18", 64, "has no list named 'blocks'"),
        ("volo_d1_224", 64, "has no list named 'blocks'"),
        ("convnext_atto", 64, "no linear layers that are called"),
        ("mvitv2_tiny", 64, "return more than hidden states"),
        ("crossvit_tiny_240", 240, "take no batch of hidden states first"),
        ("pvt_v2_b0", 64, r"output of stages\.0\.norm is not the input of stages\.1\.blocks\.0"),
        ("twins_svt_small", 64, "runs 0 of its 4 blocks once"),
        ("mixer_s32_224", 224, None),  # a chain of blocks without attention is fine
    ],
)
def test_other_structures(name, size, reason):
    takes_size = name.startswith(("volo", "mvit", "twins"))
    model = timm.create_model(name, **({"img_size": size} if takes_size else {})).eval()
    if reason is None:
        assert adapt(model, ImageInputs(size)).blocks[0].linears
        return
    with pytest.raises(InputError, match=reason):
        adapt(model, ImageInputs(size))


def test_blocks_that_are_not_chained_are_refused(tiny):
    first, second, third = tiny.blocks
    tiny.forward_features = lambda x, **_: third(second(first(tiny._pos_embed(tiny.patch_embed(x))) * 2))
    with pytest.raises(InputError, match=r"output of blocks\.0 is not the input of blocks\.1"):
        adapt(tiny, ImageInputs(32))


def test_blocks_that_are_left_out_are_refused(tiny):
    tiny.forward_features = lambda x, **_: tiny.blocks[0](tiny._pos_embed(tiny.patch_embed(x)))
    with pytest.raises(InputError, match="runs 1 of its 3 blocks"):
        adapt(tiny, ImageInputs(32))


def test_what_depends_on_the_image_beside_the_hidden_state_is_refused(tiny):
    def forward(images, **_):
        x = tiny._pos_embed(tiny.patch_embed(images))
        mask = (x.mean(dim=-1) > 0)[:, None, None, :]
        for block in tiny.blocks:
            x = block(x, attn_mask=mask)
        return x

    tiny.forward_features = forward
    with pytest.raises(InputError, match=r"passes something to blocks\.0 that depends on the image"):
        adapt(tiny, ImageInputs(32))


def test_torchs_own_attention_is_skipped(tiny):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.MultiheadAttention(48, 3, batch_first=True)

        def forward(self, x, **_):
            return self.inner(x, x, x)[0]

    tiny.blocks[0].attn = Attention().eval()
    adapter = adapt(tiny, ImageInputs(32))
    assert ("blocks.0.attn.inner.in_proj", "torch's own attention, whose weights are no layers") in adapter.skipped
    assert [x.name for x in adapter.blocks[0].linears] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
