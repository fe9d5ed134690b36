"""Torch's devices and threads."""

import torch

from vitoats.common.errors import InputError

FREE_SHARE = 0.8  # of an accelerator's free memory that a compression may fill


def set_threads(threads: int) -> int:
    """Sets the number of CPU threads that torch uses, and returns it; 0 keeps torch's default, all cores."""
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def storage_device(device: torch.device, needed: int) -> torch.device:
    """Where intermediate results are kept: on an accelerator with room for ``needed`` bytes beside them, else on the CPU."""
    if device.type == "cuda" and needed <= FREE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


def check_device(device: str) -> str:
    """Checks that torch can use the device, and returns it; a GPU computes in float32 from then on, convolutions too.

    Raises:
        InputError: the device is unavailable.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"the device {device!r} cannot be used here: use `device='cpu'`") from None
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions, unlike that for matrix products, is TF32
    return device
