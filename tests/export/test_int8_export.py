"""Whole models with int8 weights: what is fused, and outputs against torch with activations that are not quantized."""

import copy
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from tests.models.test_architectures import ROTARY, STAGES, VIT, tiny_architecture
from vitoats.common.errors import InputError
from vitoats.data.transforms import Preprocessing
from vitoats.export.int8_layers import ExportedInt8Layer, _stacked, int8_layers, rounded
from vitoats.export.onnx_file import export_onnx
from vitoats.format.int8 import dequantized, round_rows
from vitoats.format.int8_layers import Int8Linear
from vitoats.format.layers import replace_module
from vitoats.format.operator import ATTENTION, COMPOSITES, DOMAIN, INT8_OPERATORS
from vitoats.format.tiles import untiled
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.models.units import find_units, keep_units
from vitoats.runtime import metadata, session

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NORM, ADD, GELU, PLAIN = "LayerNormMatMulInt8", "MatMulInt8Add", "LayerNormMatMulInt8Gelu", "MatMulInt8"
MLP, ATTN = GELU + ADD, NORM + ATTENTION


@pytest.fixture(scope="module")
def sparse() -> LoadedModel:
    """A compressed model, which exports leave as it is."""
    model = make_tiny()
    compress_in_place(model, IMAGES, job_of("oats", OATSConfig(iterations=3)))
    return LoadedModel("tiny", model, Preprocessing(img_size=32), "random")


@pytest.fixture(scope="module")
def exported(sparse, tmp_path_factory) -> Path:
    """Its file with int8 weights."""
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    before = copy.deepcopy(sparse.model.state_dict())
    export_onnx(sparse, path, int8=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.model.state_dict().items())
    return path


class RoundedPatches(nn.Module):
    """A convolution over patches as the file computes it."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.kernel = conv.kernel_size
        self.linear = Int8Linear(round_rows(conv.weight.detach().flatten(1)), conv.bias)

    def forward(self, images):
        tokens = self.linear(nn.functional.unfold(images, self.kernel, stride=self.kernel).transpose(1, 2))
        rows, columns = (length // step for length, step in zip(images.shape[2:], self.kernel, strict=True))
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def with_rounded_patches(model: nn.Module, path: Path) -> nn.Module:
    """Rounds the layer on the patches, in place, if the file does."""
    constants = {tensor.name for tensor in onnx.load(path).graph.initializer}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and f"{name}.scale" in constants:
            replace_module(model, name, RoundedPatches(module))
    return model


def float_outputs(loaded: LoadedModel, images: torch.Tensor, path: Path) -> np.ndarray:
    """What torch computes with the rounded weights and activations that are not quantized."""
    model = with_rounded_patches(copy.deepcopy(loaded).model, path)
    for name, layer in int8_layers(model).items():
        replace_module(model, name, layer.folded())
    with torch.inference_mode():
        return model(images).numpy()


def check(loaded: LoadedModel, path: Path) -> None:
    """A file's functions, and its densified form, compute what torch computes; at several batch sizes."""
    size = loaded.preprocessing.img_size
    images = torch.randn(5, 3, size, size)
    expected = float_outputs(rounded(loaded), images, path)
    opened = session(path, native=False)
    for batch in (1, 5):
        found = opened.run(None, {"images": images[:batch].numpy()})[0]
        assert np.abs(found - expected[:batch]).max() < 1e-4 * np.abs(expected).max()


OUTSIDE = ("patch_embed.proj", "stem.proj", "head", "head.fc")


def operators(proto: onnx.ModelProto) -> Counter:
    """How often each of our operators is in the blocks."""
    return Counter(node.op_type for node in proto.graph.node if node.domain == DOMAIN and node.name not in OUTSIDE)


def test_nodes_have_the_names_of_their_modules(sparse, exported):
    proto = onnx.load(exported)
    check(sparse, exported)
    nodes = {node.name: node for node in proto.graph.node if node.domain == DOMAIN}
    kinds = {
        "attn": "LayerNormSparseMatMulInt8QKVAttention",
        "attn.proj": "SparseMatMulInt8Add",
        "mlp": "LayerNormSparseMatMulInt8GeluSparseMatMulInt8Add",
    }
    of_blocks = {f"blocks.{b}.{name}": kind for b in range(3) for name, kind in kinds.items()}
    assert {name: node.op_type for name, node in nodes.items()} == of_blocks | {"head": PLAIN, "patch_embed.proj": PLAIN}
    assert {f.name for f in proto.functions} == {*kinds.values(), PLAIN}
    assert {o.domain: o.version for o in proto.opset_import} == {"": 18, DOMAIN: 3}
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info}
    for name in of_blocks:
        assert shapes[nodes[name].output[0]] == ["batch", 17, 48]
    assert shapes[nodes["patch_embed.proj"].output[0]] == ["batch", 16, 48]
    assert all(shapes.get(output) for node in proto.graph.node[1:-1] for output in node.output)  # which Netron shows
    qkv, mlp = nodes["blocks.1.attn"], nodes["blocks.1.mlp"]
    own = ("values", "mask", "scale", "bias", "U", "U_scale", "V", "V_scale")
    assert list(qkv.input[1:]) == [
        *("blocks.1.norm1.weight", "blocks.1.norm1.bias"),
        *(f"blocks.1.attn.qkv.{name}" for name in own),
    ]
    assert list(mlp.input[3:]) == [f"blocks.1.mlp.{layer}.{name}" for layer in ("fc1", "fc2") for name in own]
    assert metadata(session(exported, native=False))["weights"] == "int8"


def test_constants_are_those_of_the_layer(sparse, exported):
    proto = onnx.load(exported)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    layer = int8_layers(rounded(sparse).model)["blocks.0.attn.qkv"]
    own = {key.removeprefix("blocks.0.attn.qkv."): value for key, value in constants.items() if ".0.attn.qkv." in key}
    assert own["mask"].shape == (9, 12, 8)
    assert own["values"].size == layer.nonzeros
    assert own["V"].shape[0] == 3
    assert np.array_equal(untiled(own["V"][2], *layer.V_int8[2].shape), layer.V_int8[2].numpy())
    assert np.array_equal(own["V_scale"][2], layer.V_scale[2].numpy())


ARCHITECTURES = [
    # (timm name, arguments, operators, what the log says of the attention that stays)
    ("vit_base_patch16_224", VIT, {ATTN: 2, ADD: 2, MLP: 2}, None),
    # layer scale
    ("deit3_small_patch16_224", VIT, {ATTN: 2, ADD: 2, MLP: 2}, None),
    # an approximation of GELU, which is not fused
    ("vit_base_patch32_clip_quickgelu_224", {"img_size": 64, **VIT}, {ATTN: 2, NORM: 2, ADD: 4}, None),
    # relative positions, biases of q and v apart, layer scale
    ("beit_base_patch16_224", VIT, {NORM: 2, ADD: 2, MLP: 2}, "2 of 2 .* added to its scores"),
    # windows: reshaped after the norm and before the residual
    (
        "swin_tiny_patch4_window7_224",
        {"window_size": 4, **STAGES, "depths": (2, 1)},
        {PLAIN: 6, NORM: 1, MLP: 3},
        "3 of 3 .* added to its scores",
    ),
    # attention over the last tokens from one query; q, k and v apart
    ("vit_base_patch16_siglip_224", VIT, {ATTN: 2, ADD: 2, MLP: 2}, "1 of 3 .* order"),
]
MORE = [
    ("vit_small_patch14_reg4_dinov2", {"img_size": 28, **VIT}, {ATTN: 2, ADD: 2, MLP: 2}, None),
    # SwiGLU
    ("vit_giant_patch14_reg4_dinov2", {"img_size": 28, **VIT}, {ATTN: 2, NORM: 2, ADD: 4}, None),
    # rotary positions
    ("vit_small_patch16_dinov3", ROTARY, {NORM: 2, ADD: 2, MLP: 2}, "2 of 2 .* transformed"),
    ("eva02_tiny_patch14_224", {"img_size": 28, **ROTARY}, {NORM: 4, ADD: 4}, "2 of 2 .* transformed"),
    # q, k and v in three layers, and a gate in two
    ("eva02_base_patch14_224", {"img_size": 28, **ROTARY}, {PLAIN: 10, "LayerNormMatMulInt8Add": 2, ADD: 2}, "2 of 2"),
    # two blocks side by side, whose outputs are stacked before they are added
    ("vit_small_patch16_18x2_224", VIT, {ATTN: 4, PLAIN: 8, GELU: 4}, None),
    ("samvit_base_patch16_224", VIT, {PLAIN: 4, MLP: 2}, "2 of 2 .* added to its scores"),
    ("mixer_s32_224", {"img_size": 64}, None, None),
    ("xcit_nano_12_p16_224", VIT, None, None),
    ("cait_xxs24_224", VIT, None, None),
    ("swinv2_tiny_window8_256", {"window_size": 4, **STAGES, "depths": (1, 1)}, None, None),
    ("hiera_tiny_224", {"embed_dim": 24, "num_heads": 1, "stages": (1, 1), "q_pool": 1}, None, None),
    ("davit_tiny", {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 2)}, None, None),
    ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}, None, None),
]


@pytest.mark.parametrize(
    ("name", "arguments", "expected", "said"),
    [*ARCHITECTURES, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)],
    ids=lambda x: x if isinstance(x, str) and "_" in x else "",
)
def test_architectures_compute_the_same_whatever_is_fused(name, arguments, expected, said, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitoats")
    sizes = {} if name in ("davit_tiny", "convnext_tiny") else {"img_size": 32}
    loaded = tiny_architecture(name, {**sizes, **arguments})
    proto = export_onnx(loaded, tmp_path / "model.onnx", int8=True)
    check(loaded, tmp_path / "model.onnx")
    if expected is not None:
        assert operators(proto) == expected
        lines = [record.getMessage() for record in caplog.records if "attention layers" in record.getMessage()]
        assert len(lines) == (said is not None)
        assert said is None or re.search(said, lines[0])


@pytest.mark.parametrize("architecture", ["sparse", "layer scale", "windows"])
def test_native_operators_are_as_exact_as_what_torch_simulates(sparse, exported, architecture, tmp_path):
    """Activations that differ in their last bits are sometimes rounded to another byte, but the error does not grow."""
    if architecture == "sparse":
        model, proto = sparse, onnx.load(exported)
    else:
        part = {"layer scale": "deit3", "windows": "swin"}[architecture]
        name, arguments, *_ = next(row for row in ARCHITECTURES if part in row[0])
        model = tiny_architecture(name, {"img_size": 32, **arguments})
        proto = export_onnx(model, tmp_path / "model.onnx", int8=True)
    for node in proto.graph.node:  # attention in float32, as in torch
        for attribute in node.attribute:
            if attribute.name == "bfloat16":
                attribute.i = 0
    onnx.save(proto, tmp_path / "model.onnx")
    loaded = rounded(model)
    images = torch.randn(100, 3, 32, 32)
    with torch.inference_mode():
        simulated = with_rounded_patches(copy.deepcopy(loaded).model, tmp_path / "model.onnx")(images).numpy()
    exact = float_outputs(loaded, images, tmp_path / "model.onnx")
    native = session(tmp_path / "model.onnx")
    assert all(f"{name}.".startswith(tuple(f"{node}." for node in native.native_nodes)) for name in int8_layers(model.model))
    assert len(native.native_nodes) == sum(node.domain == DOMAIN and node.op_type != ATTENTION for node in proto.graph.node)

    def error(found) -> float:
        return float(np.sqrt(((found - exact) ** 2).mean()))

    assert 0 < error(native.run(None, {"images": images.numpy()})[0]) < 1.15 * error(simulated)


def test_a_layer_scale_of_any_sign_is_folded(tmp_path):
    loaded = tiny_architecture("vit_small_patch14_reg4_dinov2", {"img_size": 28, **VIT, "depth": 1})
    for name, parameter in loaded.model.named_parameters():
        if "gamma" in name:
            parameter.copy_(torch.linspace(-1, 1, len(parameter)).round(decimals=1))  # with zeros
    proto = export_onnx(loaded, tmp_path / "model.onnx", int8=True)
    assert not any("gamma" in t.name for t in proto.graph.initializer)
    assert all(node.op_type != "Mul" for node in proto.graph.node)
    check(loaded, tmp_path / "model.onnx")


def test_equal_layer_scales_that_are_stored_once_are_folded_into_each_layer(tmp_path):
    model = tiny_architecture("deit3_small_patch16_224", {"img_size": 32, **VIT})
    blocks = model.model.blocks
    blocks[1].load_state_dict(blocks[0].state_dict())
    export_onnx(model, tmp_path / "model.onnx", int8=True)
    check(model, tmp_path / "model.onnx")


@pytest.mark.parametrize("int8", [True, False])
def test_fewer_heads(int8, tmp_path):
    model = make_tiny()
    keep_units(model, find_units(model, "blocks.1")[0], torch.tensor([0, 2]))
    if not int8:
        compress_in_place(model, IMAGES, job_of("oats", OATSConfig(iterations=2)))
    loaded = LoadedModel("tiny", model, Preprocessing(img_size=32), "random")
    proto = export_onnx(loaded, tmp_path / "model.onnx", int8=int8)
    attention = [node for node in proto.graph.node if node.op_type.endswith(ATTENTION)]
    heads = [next(a.i for a in node.attribute if a.name == "num_heads") for node in attention]
    bfloat16 = [next(a.i for a in node.attribute if a.name == "bfloat16") for node in attention]
    assert (heads, bfloat16) == ([3, 2, 3], [int(int8)] * 3)
    if int8:
        check(loaded, tmp_path / "model.onnx")
    else:
        with torch.inference_mode():
            expected = model(IMAGES).numpy()
        for native in (True, False):
            found = session(tmp_path / "model.onnx", native=native).run(None, {"images": IMAGES.numpy()})[0]
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_tanh_form_of_gelu_stays(tmp_path):
    model = make_tiny()
    for block in model.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")
    loaded = LoadedModel("tiny", model, Preprocessing(img_size=32), "random")
    proto = export_onnx(loaded, tmp_path / "model.onnx", int8=True)
    assert operators(proto) == {ATTN: 3, NORM: 3, ADD: 6}
    check(loaded, tmp_path / "model.onnx")


class Branches(nn.Module):
    """Linear layers in places where nothing, or not everything, may be fused."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        block = self.blocks[0]
        block.norm, block.fc1, block.fc2, block.fc3 = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        block.bare = nn.LayerNorm(12, elementwise_affine=False)
        block.forward = self._block
        self.row = nn.Parameter(torch.randn(1, 4, 12))
        self.num_classes = 0

    def _block(self, x):
        block = self.blocks[0]
        shared = block.norm(x)  # read twice
        y = block.fc1(shared) + self.row  # broadcast over the batch
        y = y * shared
        z = block.fc2(block.bare(y))
        z = nn.functional.gelu(z) + z  # read by more than GELU
        w = block.fc3(z)
        return w + w

    def forward(self, images):
        return self.blocks[0](images.flatten(2)[:, :, :48].reshape(-1, 3, 4, 12).mean(1))


def test_what_others_read_too_is_not_fused(tmp_path):
    loaded = LoadedModel("branches", Branches().eval(), Preprocessing(img_size=32), "random")
    proto = export_onnx(loaded, tmp_path / "model.onnx", int8=True)
    assert operators(proto) == {PLAIN: 3}
    check(loaded, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "parts",
    [
        [(16, 2)],
        [(32, 2), (32, 2), (32, 2)],
        # ranks that differ, down to none
        [(16, 3), (16, 0), (16, 18)],
        [(16, 0)],
        # heights that differ, or are no multiple of a strip
        [(16, 2), (32, 1)],
        [(4, 2), (4, 1), (4, 0)],
    ],
)
def test_stacked_factors_stand_for_the_same_matrix(parts):
    generator = torch.Generator().manual_seed(0)
    U = [torch.randint(-127, 128, (rows, rank), generator=generator, dtype=torch.int8) for rows, rank in parts]
    V = [torch.randint(-127, 128, (rank, 7), generator=generator, dtype=torch.int8) for _, rank in parts]
    scales = [[torch.rand(len(m), generator=generator) for m in matrices] for matrices in (U, V)]
    expected = torch.cat(
        [dequantized(u, su) @ dequantized(v, sv) for u, su, v, sv in zip(U, scales[0], V, scales[1], strict=True)]
    )
    found = {name: tensor.numpy() for name, tensor in _stacked(U, scales[0], V, scales[1]).items()}
    count, rank = found["V_scale"].shape
    assert count in (1, len(parts))
    assert rank >= 1
    u = found["U_scale"][:, None] * untiled(found["U"], len(expected), rank)
    v = found["V_scale"][..., None] * untiled(found["V"], rank, 7)
    assert np.allclose((u.reshape(count, -1, rank) @ v).reshape(expected.shape), expected, atol=1e-3)


def test_int8_layers_stay_int8_in_every_form_but_dense(sparse, exported, tmp_path):
    loaded = rounded(sparse)
    export_onnx(loaded, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == exported.read_bytes()
    inline = export_onnx(loaded, tmp_path / "inline.onnx", "inline")
    assert {node.domain for node in inline.graph.node} <= {"", "ai.onnx"}
    check(sparse, tmp_path / "inline.onnx")
    dense = export_onnx(loaded, tmp_path / "dense.onnx", "dense")
    assert {node.domain for node in dense.graph.node} == {""}
    stored = [sum(len(tensor.raw_data) for tensor in model.graph.initializer) for model in (inline, dense)]
    assert stored[0] < 0.4 * stored[1]  # nodes apart, of which a model this small has as many bytes as of weights
    assert "weights" not in metadata(session(tmp_path / "dense.onnx"))
    check(sparse, tmp_path / "dense.onnx")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"float16": True}, "`float16`"), ({"form": "matmul"}, "`form='matmul'`"), ({"form": "dense"}, "`form='dense'`")],
)
def test_forms_without_int8_are_refused(sparse, tmp_path, arguments, said):
    with pytest.raises(InputError, match=said):
        export_onnx(sparse, tmp_path / "model.onnx", **arguments, int8=True)
    assert not list(tmp_path.iterdir())


def test_too_many_inputs_are_refused():
    weight = torch.zeros(1, 70_000, dtype=torch.int8), torch.ones(1)
    with pytest.raises(InputError, match="70000 inputs"):
        ExportedInt8Layer(Int8Linear(weight))


def test_a_layer_without_low_rank_that_keeps_most_weights_is_dense(tmp_path):
    model = make_tiny()
    compress_in_place(model, IMAGES, job_of("oats", OATSConfig(iterations=2, compression=0.05, rank_ratio=0.0)))
    loaded = LoadedModel("tiny", model, Preprocessing(img_size=32), "random")
    proto = export_onnx(loaded, tmp_path / "model.onnx", int8=True)
    assert operators(proto) == {ATTN: 3, ADD: 3, MLP: 3}
    check(loaded, tmp_path / "model.onnx")
    assert set(operators(proto)) <= {*INT8_OPERATORS, *COMPOSITES}
