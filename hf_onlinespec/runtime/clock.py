"""Times of work on a device: an accelerator is told what to do long before it has done it."""

from __future__ import annotations

import time

import torch

QUEUES = ("cuda", "mps", "xpu")  # types of devices that work through a queue while Python goes on


def is_host(device: torch.device) -> bool:
    """Whether values on a device can be read without waiting for it."""
    return device.type == "cpu"


def finished(device: torch.device) -> float:
    """`time.perf_counter()` once a device has done all that it was told; on a CPU that is at once.

    It waits for the device, so that the next work is queued later: at most once in a round, and only where a decision needs it.
    """
    if device.type in QUEUES:
        module = torch.get_device_module(device.type)
        if device.type == "mps":  # there is but one
            module.synchronize()
        else:
            module.synchronize(device)
    return time.perf_counter()
