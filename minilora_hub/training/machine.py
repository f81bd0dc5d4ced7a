"""What a run was computed on and with, as results.json tells it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "transformers", "peft", "minilora_hub")


def hardware() -> str:
    """What this process computes on, without the machine's name."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"CPU: {os.cpu_count()} cores of {name}"


def library_versions() -> dict[str, str]:
    """Versions of the packages that made the numbers."""
    return {name: version(name) for name in LIBRARIES}
