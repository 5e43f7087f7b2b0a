"""On what vLLM runs on this machine."""

import shutil
from pathlib import Path


def has_nvidia_driver() -> bool:
    """Whether vLLM would find an NVIDIA GPU's driver here; under WSL only nvidia-smi tells."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
