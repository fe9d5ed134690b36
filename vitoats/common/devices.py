"""Torch's devices and threads."""

import torch

from vitoats.common.errors import InputError


def set_threads(threads: int) -> int:
    """Sets torch's CPU threads; 0 takes all cores. Returns how many there are."""
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def check_device(device: str) -> str:
    """Checks that torch has the device.

    Raises:
        InputError: it has not.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"the device {device!r} cannot be used here: use `device='cpu'`") from None
    return device
