"""Hidden states between blocks: in memory or in a mapped file, of one shape or of several."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.calibration.states import collect, inputs_in_float64
from vitoats.calibration.moments import input_statistics
from vitoats.calibration.walk import walk

import timm  # isort: skip


def test_a_mapped_file_gives_the_same_bits_and_disappears(tiny, tmp_path):
    images = torch.randn(6, 3, 32, 32)
    adapter, in_memory = collect(tiny, images)
    _, mapped = collect(tiny, images, spill_to=tmp_path)
    assert not list(tmp_path.iterdir())  # unlinked while in use, so that nothing can leave it behind
    for block in adapter.blocks:
        in_memory.advance(block)
        mapped.advance(block)
    assert torch.equal(in_memory.values, mapped.values)


SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 32, "num_classes": 4}


@pytest.mark.parametrize("spill", [False, True])
def test_hidden_states_that_change_their_shape(tmp_path, spill):
    """Swin: 8 x 8 x 24, then 4 x 4 x 48. The second moments after it are those of whole forward passes."""
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    images = torch.randn(7, 3, 32, 32)
    adapter, hidden = collect(model, images, spill_to=tmp_path if spill else None)
    assert [block.shape_before for block in adapter.blocks] == [(8, 8, 24), (8, 8, 24), (4, 4, 48)]
    assert [block.shape_after for block in adapter.blocks] == [(8, 8, 24), (4, 4, 48), (4, 4, 48)]
    *_, last = walk(adapter.blocks, hidden)
    assert hidden.values.shape == (7, 4, 4, 48)
    assert not list(tmp_path.iterdir())
    found = input_statistics(hidden, last)
    for name, got in found.items():
        expected = inputs_in_float64(model, name, images).square().mean(dim=0)
        assert torch.allclose(got.second_moment, expected, rtol=1e-4), name


def test_no_room_for_the_mapped_file_is_an_error_not_a_signal(tmp_path):
    """A real limit on file size stands in for a full disk."""
    code = f"""
import resource
from pathlib import Path
from vitoats.calibration.hidden_states import CPU, _allocate
from vitoats.common.errors import RunError
from vitoats.models.inputs import ImageInputs
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    _allocate((1000, 1000), CPU, Path({str(tmp_path)!r}))
except RunError as error:
    assert "`nsamples`" in str(error), error
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert done.stdout == "refused\n", done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # only the child was limited


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hidden_states_in_a_file_are_not_resident_while_batches_pass(tmp_path):
    """256 MB of them, in batches of 8 MB; the peak that Linux noted of a process of its own."""
    code = f"""
import re, torch
from pathlib import Path
from types import SimpleNamespace
from vitoats.calibration.hidden_states import CPU, HiddenStates, _allocate

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder = Path({str(tmp_path)!r})
hidden = HiddenStates(_allocate((64, 1000, 1000), CPU, folder), 2, CPU, folder)
before = resident("VmRSS")
block = SimpleNamespace(shape_after=(1000, 1000), run=lambda batch, _: batch + 1)
hidden.values[:1] = 0
hidden.advance(block)
first = hidden.values[0, 0, 0].item()
total = sum(batch[0, 0, 0].item() for batch in hidden.copy(folder).batches())
print(resident("VmHWM") - before, first)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, first = done.stdout.split()
    assert float(first) == 1
    assert int(grown) < 128e6  # of 512 MB
