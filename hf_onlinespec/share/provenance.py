"""The machine that numbers were measured on."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .artifact import versions


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the settings."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Only where this process has used it: asking would start it.
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **versions(),
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of an accelerator did not suffice."""
    # torch reports the CPU's as a plain RuntimeError: "[enforce fail …] DefaultCPUAllocator: can't allocate memory".
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


@cache
def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux: platform.processor() knows only the architecture there
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
