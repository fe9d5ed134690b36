"""Hidden states of small models, and what their layers get in one whole forward pass."""

import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from tests.conftest import make_tiny
from vitoats.calibration.hidden_states import HiddenStates
from vitoats.models.adapter import adapt
from vitoats.models.hooks import inputs_of
from vitoats.models.inputs import ImageInputs

from timm.layers import LayerScale  # isort: skip


def collect(model, images, batch_size=4, **kwargs):
    """The adapter of a model for 32 px, and images before its first block; they come in batches of 3."""
    adapter = adapt(model, ImageInputs(32))
    return adapter, HiddenStates.collect(adapter, iter(images.split(3)), len(images), batch_size, **kwargs)


def inputs_in_float64(model, name, images):
    """What a layer gets, [n_tokens, d_in]."""
    model = model.double()
    with torch.inference_mode():
        caught = inputs_of({name: model.get_submodule(name)}, lambda: model(images.double()))
    model.float()
    return caught[name].reshape(-1, caught[name].shape[-1])


def scaled() -> torch.nn.Module:
    """The tiny model with layer scales, one channel of which is closed."""
    model = make_tiny()
    for block in model.blocks:
        block.ls1, block.ls2 = LayerScale(48), LayerScale(48)
        block.ls1.gamma.data = torch.rand(48) + 0.1
        block.ls2.gamma.data = torch.rand(48) + 0.1
        block.ls1.gamma.data[5] = 0
    return model
