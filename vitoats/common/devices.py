"""Torch's devices and threads."""

import torch

from vitoats.common.errors import InputError


def set_threads(threads: int) -> int:
    """Sets the number of CPU threads that torch uses, and returns it; 0 keeps torch's default, all cores."""
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def check_device(device: str) -> str:
    """Checks that torch can use the device, and returns it.

    Raises:
        InputError: the device is unavailable.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"the device {device!r} cannot be used here: use `device='cpu'`") from None
    return device
