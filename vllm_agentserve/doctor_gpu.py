"""What `agentserve doctor` says of GPUs: the cards, how lanes would divide one, and what stands against that."""

import enum
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_agentserve.lanes.cuda.green import Device, device_plan
from vllm_agentserve.policy.reserve import CONTEXT_BYTES, DECODE_SHARES, MIB, workspace_bytes
from vllm_agentserve.vllm_compat import LaneError
from vllm_agentserve.vllm_compat.cuda import cuda_driver

MIN_DRIVER = 550
"""First NVIDIA driver branch with CUDA 12.4."""
JETSON = "(nvgpu)"
"""In the name of a GPU of a Jetson, whose drivers are numbered in their own way."""
NOT_TOLD = re.compile(r"\[?(N/A|Not Supported|Unknown Error|Insufficient Permissions)\]?")
"""What nvidia-smi says in place of a number: so for memory where GPU and CPU share it."""
MPS_FOLDER = "/tmp/nvidia-mps"
"""Where a client of MPS looks for its server, unless CUDA_MPS_PIPE_DIRECTORY says otherwise."""


class Level(enum.Enum):
    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what it is, what was found, and what to do about it (empty where nothing is to be done)."""

    subject: str
    level: Level
    found: str
    remedy: str = ""


def asked_smi(fields: str) -> list[str] | Finding:
    """A line of nvidia-smi for every GPU, with these fields between commas; a finding where it does not answer."""
    command = [str(shutil.which("nvidia-smi")), f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except subprocess.TimeoutExpired:
        return Finding("GPU", Level.PROBLEM, "nvidia-smi did not answer within 30 s", "check the driver")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        return Finding("GPU", Level.PROBLEM, f"nvidia-smi: {said}", "check the driver")
    return done.stdout.strip().splitlines()


def gpu_findings(line: str) -> list[Finding]:
    """Reads one line of nvidia-smi: name, driver, total and free memory in MiB, which it may not tell."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 4 or not all(re.fullmatch(r"\d+", field) or NOT_TOLD.fullmatch(field) for field in fields[2:]):
        return [Finding("GPU", Level.PROBLEM, f"nvidia-smi said {line!r}", "check the driver")]
    name, driver = fields[:2]
    branch = int(driver.split(".")[0]) if driver.split(".")[0].isdigit() else 0
    ok = branch >= MIN_DRIVER or JETSON in name
    remedy = "" if ok else f"install driver {MIN_DRIVER} or newer"
    findings = [Finding("GPU", Level.OK if ok else Level.PROBLEM, f"{name}, driver {driver}", remedy)]
    if not all(field.isdigit() for field in fields[2:]):
        found = "nvidia-smi does not tell how much there is, as where GPU and CPU share their memory"
        findings.append(Finding("GPU memory", Level.NOTE, found))
        return findings
    total, free = int(fields[2]), int(fields[3])
    if free < 0.8 * total:
        found = f"{free} of {total} MiB free"
        findings.append(
            Finding("GPU memory", Level.NOTE, found, "end what else uses the GPU, or lower --gpu-memory-utilization")
        )
    return findings


def check_mig() -> list[Finding]:
    """Whether a GPU is cut into instances. Older cards and drivers do not know the question."""
    lines = asked_smi("mig.mode.current")
    if isinstance(lines, Finding) or "Enabled" not in [line.strip() for line in lines]:
        return []
    found = (
        "MIG is on: vLLM runs on one instance, and two lanes would divide the multiprocessors of that instance alone"
    )
    return [Finding("MIG", Level.NOTE, found, "if the driver refuses green contexts there, use mode 'time-sliced'")]


def check_mps() -> list[Finding]:
    """Whether processes would share the GPU through MPS."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "")
    if not folder and not (Path(MPS_FOLDER) / "control").exists():
        return []
    found = (
        "MPS is on: green contexts work beneath it while CUDA_MPS_ACTIVE_THREAD_PERCENTAGE is not set, but other processes may "
        "run on the multiprocessors of both lanes at any time"
    )
    return [Finding("MPS", Level.NOTE, found, "give the server a GPU of its own, or use mode 'time-sliced'")]


def planned(share: float | None) -> Device | str | None:
    """How lanes would divide the first GPU that CUDA shows; why they could not, or None where the driver cannot be asked."""
    shares: Sequence[float] = DECODE_SHARES if share is None else (share,)
    try:
        return device_plan(cuda_driver(), 0, shares)
    except ImportError:
        return None
    except LaneError as refusal:
        return str(refusal)


def plan_text(device: Device) -> str:
    """Slots in multiprocessors, and the memory that lanes take of the device beside weights and KV cache."""
    slots = ", ".join(f"{slot.decode}+{slot.prefill}" for slot in device.slots)
    streams = 2 * len(device.slots) + 1
    workspaces = streams * workspace_bytes(device.major)
    contexts = 2 * len(device.slots)
    return (
        f"of {device.units} multiprocessors, decode + prefill: {slots}. Before the KV cache is sized, the worker sets memory "
        "aside for what chunks take beside a step: an estimate from the step that vLLM profiles, which warm-up then checks; "
        f"cuBLAS workspaces of {streams} streams alone are {workspaces / MIB:.0f} MiB, and {contexts} green contexts are taken "
        f"for {contexts * CONTEXT_BYTES / MIB:.0f} MiB"
    )
