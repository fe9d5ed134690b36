"""Single matrices of a dense model, with the moments of inputs that plain hooks caught."""

import pytest
import torch

from vitoats.benchmark.matrices import dense_matrices
from vitoats.common.errors import InputError
from vitoats.loading.load import load_model


@pytest.fixture
def loaded(tiny_folder):
    return load_model(f"local-dir:{tiny_folder}")


@pytest.mark.parametrize("needs", ["full", "diagonal"])
@pytest.mark.parametrize("blocks", [[0], [2], [0, 2]])
def test_inputs_are_those_of_the_dense_model(loaded, needs, blocks):
    images = loaded.inputs.noise(6, 0)
    caught: dict[str, torch.Tensor] = {}
    for name, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, name=name: caught.update({name: args[0].flatten(0, -2).double()}))
    with torch.inference_mode():
        loaded.model(images)
    seen = dict(caught)

    matrices = dense_matrices(loaded, iter(images.split(3)), 6, 3, blocks, needs)
    layers = ("attn.qkv[0]", "attn.qkv[1]", "attn.qkv[2]", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert [matrix.name for matrix in matrices] == [f"blocks.{i}.{layer}" for i in blocks for layer in layers]
    for matrix in matrices:
        X = seen[matrix.name.split("[")[0]]
        assert torch.allclose(matrix.inputs.second_moment, X.square().mean(dim=0), rtol=1e-4)
        if needs == "full":
            assert torch.allclose(matrix.inputs.full, X.T @ X / len(X), rtol=1e-4, atol=1e-5)
    q, k, v = (matrix.weight for matrix in matrices[:3])
    assert torch.equal(torch.cat([q, k, v]), loaded.model.blocks[blocks[0]].attn.qkv.weight)


def test_a_block_that_is_none_is_refused(loaded):
    with pytest.raises(InputError, match="its blocks are 0 to 2"):
        dense_matrices(loaded, iter([loaded.inputs.noise(1, 0)]), 1, 1, [0, 3], "diagonal")
