"""The machine that the figures are from: the GPU and its limits, versions, and the variables that matter."""

import csv
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from vllm_agentserve.gpucheck.check_run import PACKAGE, CheckRun, PartResult
from vllm_agentserve.vllm_compat import installed_vllm

PACKAGES = ("torch", "triton", "cuda-bindings", "transformers", "numpy", "vllm-agentserve")
VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_MPS_PIPE_DIRECTORY",
    "PYTORCH_CUDA_ALLOC_CONF",
)
SMI_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_total_mib": "memory.total",
    "memory_free_mib": "memory.free",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "mig": "mig.mode.current",
}
"""What is asked of nvidia-smi, by the name it has in the results."""
SMI_S = 20.0
UNKNOWN = "how much memory the GPU has free is not known, since the part `environment` did not come to its end"


def read_smi(line: str) -> dict[str, str]:
    """One line of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits` by field name.

    Raises:
        ValueError: it has another number of fields.
    """
    values = [value.strip() for value in next(csv.reader([line]))]
    return dict(zip(SMI_FIELDS, values, strict=True))


def ask_smi(gpu: str = "0") -> dict[str, str] | None:
    """A GPU through nvidia-smi, by its UUID or its number there. None without nvidia-smi, when it knows no such GPU, or when
    it does not answer: with many GPUs and no persistence mode it can take long."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = [
        "nvidia-smi",
        f"--id={gpu}",
        f"--query-gpu={','.join(SMI_FIELDS.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(query, text=True, capture_output=True, check=False, timeout=SMI_S)
        return read_smi(done.stdout.splitlines()[0]) if done.returncode == 0 and done.stdout.strip() else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def ask_nvml(gpu: str) -> dict[str, str] | None:
    """A GPU, by its UUID, through NVML's Python library, which may be there where nvidia-smi is not; None without."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None  # no library or no driver
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name, driver = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion()
        return {
            "name": str(name),
            "driver": str(driver),
            "memory_total_mib": str(memory.total >> 20),
            "memory_free_mib": str(memory.free >> 20),
            "sm_clock_mhz": str(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            "sm_clock_max_mhz": str(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            "memory_clock_mhz": str(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
            "power_limit_w": str(pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000),
            "temperature_c": str(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        }
    except pynvml.NVMLError:
        return None  # an instance of MIG, or a figure that this GPU does not give
    finally:
        pynvml.nvmlShutdown()


def ask(uuid: object) -> dict[str, str] | None:
    """The GPU with this UUID, as torch gives it; None where neither knows it. With `CUDA_VISIBLE_DEVICES` torch's first GPU is
    not the first of the machine."""
    if uuid is None:
        return None
    name = f"GPU-{uuid}"
    return ask_smi(name) or ask_nvml(name)


def versions() -> dict[str, str | None]:
    """Installed versions by package; None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "vllm": installed_vllm()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def collect(options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, in a child process, for it starts CUDA."""
    import torch

    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
        "torch_cuda": torch.version.cuda,
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "gpu": None,
    }
    if options["device"] == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        facts["gpu"] = {
            **(ask(getattr(properties, "uuid", None)) or {"name": properties.name}),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "free_gib": round(free / 2**30, 1),
            "total_gib": round(total / 2**30, 1),
        }
    return facts


def free_gib(check: CheckRun) -> float | None:
    """Free memory of the GPU as this part saw it; None without one."""
    facts = check.raw("environment")
    return None if facts is None or facts["gpu"] is None else float(facts["gpu"]["free_gib"])


def run(check: CheckRun) -> PartResult:
    """The part."""
    ended = check.run("environment", f"{PACKAGE}.environment:collect", {"device": check.device}, fresh=True)
    if ended.error is not None:
        return PartResult(ended.status, "the machine could not be described", [ended.error])
    facts = ended.result
    rows = {**facts["versions"], "torch built for CUDA": facts["torch_cuda"], "cores": facts["cores"]}
    rows |= {f"GPU {name}": value for name, value in (facts["gpu"] or {}).items()}
    rows |= facts["variables"]
    page = ["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    if check.device == "cuda" and facts["gpu"] is None:
        return PartResult("failed", "torch finds no CUDA device", page, facts)
    gpu = facts["gpu"]
    shown = f"{gpu['name']}, {gpu['multiprocessors']} SMs, {gpu['free_gib']} GiB free" if gpu else "no CUDA device"
    found = facts["versions"]
    return PartResult("ok", f"{shown}; vLLM {found['vllm']}, torch {found['torch']}", page, facts)
