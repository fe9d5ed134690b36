"""Tensor files: the same tensors and metadata are the same bytes."""

import safetensors
import torch

from vitoats.common.tensor_files import save_tensors


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2, dtype=torch.uint8)}
    metadata = {name: f'{name} é \u2028 "quoted" \n' for name in "zyxwvutsrq"}
    for i in range(8):
        save_tensors(tmp_path / f"{i}.safetensors", tensors, metadata)
    contents = {(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}
    assert len(contents) == 1
    with safetensors.safe_open(str(tmp_path / "0.safetensors"), "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
