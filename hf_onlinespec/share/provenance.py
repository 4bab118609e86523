"""Where numbers were measured: the machine, and the versions of the packages."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import peft
import torch
import transformers

from ..runtime.version import __version__
from .records import Record


@dataclass
class Provenance(Record):
    """What speeds depend on beside the settings."""

    cpu: str
    cores: int | None
    threads: int  # of torch
    gpu: str | None
    platform: str
    python: str
    hf_onlinespec: str
    torch: str
    transformers: str
    peft: str


def provenance() -> Provenance:
    """Of what this process measures."""
    found = versions()
    return Provenance(
        cpu=_cpu(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        # Only where this process has used it: asking would start it.
        gpu=torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        platform=platform.platform(),
        python=platform.python_version(),
        hf_onlinespec=found["hf_onlinespec"],
        torch=found["torch"],
        transformers=found["transformers"],
        peft=found["peft"],
    )


def versions() -> dict[str, str]:
    """Of this package and of those that decide what it computes."""
    packages = {"torch": torch, "transformers": transformers, "peft": peft}
    return {"hf_onlinespec": __version__} | {name: str(module.__version__) for name, module in packages.items()}


@cache
def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux: platform.processor() knows only the architecture there
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
