"""Find a device by its name."""

from __future__ import annotations

import os

import torch

from bora_pyro.errors import InputError


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is an accelerator if there is one, otherwise the CPU.

    Raises:
        InputError: torch has no such device here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    if ":" not in name and name != "cpu" and "LOCAL_RANK" in os.environ:
        name = f"{name}:{os.environ['LOCAL_RANK']}"  # one device for each process of this machine
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        fewer = ", or start fewer processes" if "LOCAL_RANK" in os.environ else ""
        raise InputError(f"device {name!r} is not available here; use --device auto, or --device cpu{fewer}") from error
    return torch.device(name)
