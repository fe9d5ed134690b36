"""Blocks and linear layers are found by structure, over many timm architectures; what does not fit is refused."""

import pytest
import torch

import vitoats.torchvision_ops  # noqa: F401  (before timm)
from vitoats.errors import InputError
from vitoats.models.adapter import adapt

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
    adapter = adapt(model, img_size)
    assert adapter.block_names == [f"blocks.{i}" for i in range(len(model.blocks))]
    if per_block:
        assert [len(block) for block in adapter.linears] == [per_block] * len(model.blocks)
        assert [(x.name.split(".", 2)[2], x.parts) for x in adapter.linears[0]] == [
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
        assert hidden.shape[1:] == adapter.hidden_shapes[0]
        for i in range(len(model.blocks)):
            hidden = adapter.run_block(i, hidden)
    assert torch.equal(hidden, reached["last"])


def test_every_linear_is_either_compressed_or_skipped_with_a_reason():
    model = create("vit_base_patch16_224", 32, num_classes=7, **SMALL)
    adapter = adapt(model, 32)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {x.name for block in adapter.linears for x in block}
    assert chosen.isdisjoint(name for name, _ in adapter.skipped)
    assert chosen | {name for name, _ in adapter.skipped} == linears | {"patch_embed.proj"}
    assert ("head", "outside the blocks") in adapter.skipped


def test_a_weight_that_is_used_directly_is_skipped():
    """BEiT adds a bias of its own to qkv with F.linear, so replacing that module would do nothing."""
    adapter = adapt(create("beit_base_patch16_224", 32, **SMALL), 32)
    assert ("blocks.0.attn.qkv", "its weight is used directly, not by calling the layer") in adapter.skipped
    assert [x.name for x in adapter.linears[0]] == ["blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("resnet18", {}, "has no list named 'blocks'"),
        ("swin_tiny_patch4_window7_224", {}, "lists of blocks"),
        ("mixer_s32_224", {}, None),  # a chain of blocks without attention is fine
    ],
)
def test_other_structures(name, kwargs, reason):
    model = timm.create_model(name, **kwargs).eval()
    if reason is None:
        assert adapt(model, 224).linears[0]
        return
    with pytest.raises(InputError, match=reason):
        adapt(model, 224)


def test_blocks_that_are_not_chained_are_refused(tiny):
    first, second, third = tiny.blocks
    tiny.forward_features = lambda x, **_: third(second(first(tiny._pos_embed(tiny.patch_embed(x))) * 2))
    with pytest.raises(InputError, match=r"output of blocks\.0 is not the input of blocks\.1"):
        adapt(tiny, 32)


def test_blocks_that_are_left_out_are_refused(tiny):
    tiny.forward_features = lambda x, **_: tiny.blocks[0](tiny._pos_embed(tiny.patch_embed(x)))
    with pytest.raises(InputError, match="runs 1 of its 3 blocks"):
        adapt(tiny, 32)
