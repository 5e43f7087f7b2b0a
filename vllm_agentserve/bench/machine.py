"""What the figures were measured on: hardware and versions, without names of hosts and users."""

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from vllm_agentserve import __version__
from vllm_agentserve.vllm_compat import installed_vllm


def describe_machine() -> dict[str, Any]:
    """Hardware and versions, for the report."""
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": gpu_names(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "vllm": installed_vllm(),
        "torch": version_of("torch"),
        "agentserve": __version__,
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Name, driver and memory of every NVIDIA GPU; empty without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return []  # no library or no driver
    try:
        driver = text(pynvml.nvmlSystemGetDriverVersion())
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
            found.append(f"{text(pynvml.nvmlDeviceGetName(handle))}, {memory:.0f} GiB, driver {driver}")
        return found
    finally:
        pynvml.nvmlShutdown()


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def in_words(machine: dict[str, Any]) -> str:
    """One line for captions."""
    device = "; ".join(machine["gpus"]) or f"no GPU, {machine['cores']} cores of {machine['cpu']}"
    return f"{device}; {machine['memory_gib']} GiB; vLLM {machine['vllm']}, torch {machine['torch']}, Python {machine['python']}"


def shown(part: str) -> str:
    """A word of a command line as it may be shown to others: `~` for the home folder, `.` for the working one."""
    if part == sys.executable:
        return "python"
    for folder, short in ((str(Path.cwd()), "."), (str(Path.home()), "~")):
        part = part.replace(folder + "/", short + "/") if folder != "/" else part
    return part
