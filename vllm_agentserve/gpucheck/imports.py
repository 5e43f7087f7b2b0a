"""Whether everything the check needs can be imported. The first failure ends the check, before any time is spent on it."""

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_agentserve.gpucheck.check_run import PACKAGE, CheckRun, PartResult

LIMIT_S = 60.0
"""vLLM and torch are read from a cold disk in less."""


@dataclass(frozen=True)
class RequiredModule:
    """One import, and what to do when it fails."""

    module: str
    remedy: str


VLLM = "install vLLM with all its requirements: the error names the one that is missing"
OURS = "unpack the whole wheel of vllm-agentserve, and put its folder on PYTHONPATH"
STEPS = {
    "cuda": (
        RequiredModule("torch", "install the torch that this vLLM was built for, with its NVIDIA libraries"),
        RequiredModule("vllm", VLLM),
        RequiredModule("vllm._C_stable_libtorch", "install a vLLM built for CUDA, with the torch it was built for"),
        RequiredModule("vllm.vllm_flash_attn", "install a vLLM built for CUDA, with its FlashAttention extensions"),
        RequiredModule(
            "cuda.bindings.driver", "install cuda-bindings, with the packages cuda-pathfinder and typing-extensions"
        ),
        RequiredModule("triton", "install the triton that torch asks for"),
        RequiredModule("vllm_agentserve.vllm_compat.cuda_worker", OURS),
        RequiredModule("vllm_agentserve.scheduler", OURS),
        # What an engine imports late, when it loads a model and chooses its attention.
        RequiredModule("vllm.v1.worker.gpu.model_runner", VLLM),
        RequiredModule("vllm.model_executor.layers.quantization.online.base", VLLM),
        RequiredModule("vllm.model_executor.models.qwen2", VLLM),
        RequiredModule("vllm.v1.attention.backends.flash_attn", VLLM),
        RequiredModule("vllm.v1.attention.backends.triton_attn", VLLM),
    ),
    "cpu": (
        RequiredModule("torch", "install the torch that this vLLM was built for"),
        RequiredModule("vllm", VLLM),
        RequiredModule("vllm._C", "install a vLLM built for CPUs"),
        RequiredModule("vllm_agentserve.scheduler", OURS),
    ),
}
"""By device, in order."""


def try_all(options: Mapping[str, Any]) -> dict[str, Any]:
    """Imports `options["steps"]` in a child process; stops at the first that fails.

    Returns:
        `seconds` by module that was imported; `failed` with the step and its `error`, or None.
    """
    seconds: dict[str, float] = {}
    for step in options["steps"]:
        # A library that ends the process leaves this line last in the log.
        print(f"importing {step['module']}", flush=True)
        began = time.monotonic()
        try:
            importlib.import_module(step["module"])
        except Exception as error:
            return {"seconds": seconds, "failed": {**step, "error": f"{type(error).__name__}: {error}"}}
        seconds[step["module"]] = round(time.monotonic() - began, 2)
    return {"seconds": seconds, "failed": None}


def run(check: CheckRun, steps: Sequence[RequiredModule] | None = None) -> PartResult:
    """The part. Beside it the imports begin in the process that all later children are forked from.

    Args:
        steps: what is imported; None for what the device needs.
    """
    check.starter.prepare(check.device, check.environment)
    wanted = [asdict(step) for step in steps or STEPS[check.device]]
    ended = check.run("imports", f"{PACKAGE}.imports:try_all", {"steps": wanted}, LIMIT_S, fresh=True)
    if ended.error is not None:
        return PartResult(
            ended.status, "the process ended while it imported", ["```", *ended.error.splitlines(), "```"]
        )
    found = ended.result
    page = ["| module | s |", "|---|---:|", *(f"| `{name}` | {took} |" for name, took in found["seconds"].items())]
    if (failed := found["failed"]) is not None:
        return PartResult("failed", f"import {failed['module']}: {failed['error']}; {failed['remedy']}", page, found)
    return PartResult("ok", f"{len(wanted)} modules", page, found)
