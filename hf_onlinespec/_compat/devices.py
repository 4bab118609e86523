"""What devices and versions of torch differ in."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .versions import imports_of_others

with imports_of_others():
    from accelerate.utils.operations import ConvertOutputsToFp32  # type: ignore[import-untyped]

AUTOCAST = "torch.amp.autocast_mode"  # where the decorator lies that puts autocast around a function


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


def autocast_inside(model: nn.Module) -> set[torch.dtype | str]:
    """In what autocast multiplies where `forward` enters it by itself: so accelerate, hence a Trainer, makes mixed precision."""
    found, forward = set[torch.dtype | str](), vars(model).get("forward")
    while True:
        forward = forward.__func__ if inspect.ismethod(forward) else forward
        if not isinstance(forward, FunctionType | ConvertOutputsToFp32):
            return found
        if isinstance(forward, FunctionType) and forward.__globals__["__name__"] == AUTOCAST:
            held = [cell.cell_contents for cell in forward.__closure__ or ()]
            found |= {one.fast_dtype for one in held if isinstance(one, torch.autocast) and one._enabled}
        forward = vars(forward).get("__wrapped__")


def doubles(values: Tensor) -> Tensor:
    """In float64, on the CPU: not every device has it (MPS)."""
    return values.detach().cpu().double()
