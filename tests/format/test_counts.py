"""Parameters, non-zeros and bytes against counts by hand, on ViT-B/16 and on the table that compress prints."""

import json

import pytest
import safetensors.torch
import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from tests.conftest import make_tiny
from vitoats.cli import common
from vitoats.cli.compress import main as compress_command
from vitoats.data.transforms import Preprocessing
from vitoats.format.counts import Counts, count
from vitoats.format.decomposition import Decomposition
from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.methods.sparsity import Pattern

import timm  # isort: skip

# ViT-B/16 at 224 px with 1000 classes: width 768, 12 blocks, 197 tokens
BLOCK_WEIGHTS = 768 * 2304 + 768 * 768 + 768 * 3072 + 3072 * 768
BLOCK_REST = 2304 + 768 + 3072 + 768 + 4 * 768  # biases; weights and biases of two norms
AROUND = 3 * 16 * 16 * 768 + 768 + 768 + 197 * 768 + 2 * 768 + 768 * 1000 + 1000  # patches, class token, positions, norm, head
VIT_B = 12 * (BLOCK_WEIGHTS + BLOCK_REST) + AROUND


def test_vit_b_by_hand():
    assert VIT_B == 86_567_656  # as published
    model = timm.create_model("vit_base_patch16_224")
    for parameter in model.parameters():
        parameter.data += 1  # no zeros
    assert count(model.state_dict(), set()) == Counts(VIT_B, VIT_B, 4 * VIT_B)


def full_budget(d_out: int, d_in: int, config: OATSConfig) -> Decomposition:
    """All that the method's budget allows, without its solver."""
    budget = config.budget(d_out, d_in)
    S = torch.ones(d_out, d_in)
    S *= Pattern.parse(config.pattern).keep(S, budget.kept_per_group)
    return Decomposition(S, torch.ones(d_out, budget.rank), torch.ones(budget.rank, d_in), 0, 0, 1)


def test_compressed_vit_b_by_hand(tmp_path):
    """OATS' budget at 50 %, rank ratio 0.25, filled with ones; by hand it is the paper's formulas, q, k and v apart."""
    model = timm.create_model("vit_base_patch16_224").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 1
    config = OATSConfig(compression=0.5, rank_ratio=0.25)
    for name, module in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(module, torch.nn.Linear):
            n_parts = 3 if name.endswith("qkv") else 1
            parts = [full_budget(module.out_features // n_parts, module.in_features, config) for _ in range(n_parts)]
            replace_module(model, name, SparseLowRankLinear.from_decompositions(parts, module.bias))
    save_checkpoint(LoadedModel("vit", model, Preprocessing(img_size=224), "random weights"), tmp_path / "out", {})
    said = json.loads((tmp_path / "out" / "vitoats.json").read_text())["counts"]

    matrices = {(768, 768): 4, (3072, 768): 1, (768, 3072): 1}  # (d_out, d_in): how many in a block
    kept, masks = 0, 0
    for (d_out, d_in), times in matrices.items():
        rank = int(0.25 * 0.5 * d_out * d_in / (d_out + d_in))
        of_a_row = d_in - int(d_in * (1 - 0.75 * 0.5))
        kept += times * (d_out * of_a_row + rank * (d_out + d_in))
        masks += times * d_out * d_in // 8
    assert said["parameters"] == said["nonzeros"] == 12 * (kept + BLOCK_REST) + AROUND
    assert said["bytes"] == 4 * said["parameters"] + 12 * masks
    file = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert said["bytes"] == len(file) - header


def test_buffers_are_bytes_and_no_parameters():
    norm = torch.nn.BatchNorm1d(6)
    buffers = {name for name, _ in norm.named_buffers()}
    assert count(norm.state_dict(), buffers) == Counts(12, 6, 12 * 4 + 12 * 4 + 8)  # weight 1, bias 0; the last counts batches


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_the_table_says_what_was_written(tiny_folder, flat_images, tmp_path, capsys, form):
    flags = f"--model local-dir:{tiny_folder} --data-dir {flat_images} --output {tmp_path / 'out'} --format {form}"
    assert common.run(compress_command, [*flags.split(), "--iterations", "2", "--nsamples", "4", "--threads", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    dense = sum(p.numel() for p in make_tiny().parameters())
    tensors = safetensors.torch.load_file(str(tmp_path / "out" / "model.safetensors"))
    kept = sum(t.numel() for name, t in tensors.items() if not name.endswith(".mask"))
    size = sum(t.nbytes for t in tensors.values())
    rows = {line.split()[0]: line.split()[1:] for line in printed if line.startswith(("parameters ", "non-zeros ", "bytes "))}
    assert rows["parameters"][:2] == [f"{dense:,}", f"{kept:,}"]
    assert rows["bytes"][:2] == [f"{4 * dense:,}", f"{size:,}"]
    assert rows["bytes"][2] == f"{100 * size / (4 * dense):.1f}"
    if form == "factored":
        assert rows["non-zeros"][1] == f"{sum(int(torch.count_nonzero(t)) for n, t in tensors.items() if 'mask' not in n):,}"
    else:
        assert size == 4 * dense
    for word in ("parameters: ", "non-zeros: ", "bytes: "):
        assert any(line.startswith(word) for line in printed)
