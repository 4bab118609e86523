"""What devices and versions of torch differ in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def matmul_dtypes(device: str) -> set[torch.dtype | str]:
    """In what a device multiplies matrices of float32 now: "tf32", and what autocast makes of them, among others.

    A setting for another device counts too, where it does not say for which it is.
    """
    if torch.is_autocast_enabled(device):
        return {torch.get_autocast_dtype(device)}
    backends: Any = torch.backends
    try:
        settings = {backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision}
        settings = {backends.fp32_precision if setting == "none" else setting for setting in settings}
        if device == "cuda":  # convolutions are TF32 by default
            settings.add(backends.cudnn.conv.fp32_precision)
    except AttributeError:  # torch before 2.9 has one setting for all devices
        # "medium" is TF32 on CUDA, bfloat16 on a CPU.
        of_all = {"highest": "ieee", "high": "tf32", "medium": "tf32 bf16"}
        settings = {"ieee", *of_all[torch.get_float32_matmul_precision()].split()}
        if device == "cuda" and backends.cudnn.allow_tf32:
            settings.add("tf32")
    names: dict[str, torch.dtype | str] = {"tf32": "tf32", "bf16": torch.bfloat16}
    return {names.get(setting, torch.float32) for setting in settings}


def doubles(values: Tensor) -> Tensor:
    """In float64, on the CPU: not every device has it (MPS)."""
    return values.detach().cpu().double()
