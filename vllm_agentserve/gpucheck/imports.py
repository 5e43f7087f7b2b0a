"""Whether everything the check needs can be imported. The first failure ends the check, before any time is spent on it."""

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_agentserve.gpucheck.place import PACKAGE, Finding, Place

LIMIT_S = 60.0
"""vLLM and torch are read from a cold disk in less."""


@dataclass(frozen=True)
class Step:
    """One import, and what to do when it fails."""

    module: str
    remedy: str


VLLM = "install vLLM with all its requirements: the error names the one that is missing"
OURS = "unpack the whole wheel of vllm-agentserve, and put its folder on PYTHONPATH"
STEPS = {
    "cuda": (
        Step("torch", "install the torch that this vLLM was built for, with its NVIDIA libraries"),
        Step("vllm", VLLM),
        Step("vllm._C_stable_libtorch", "install a vLLM built for CUDA, with the torch it was built for"),
        Step("vllm.vllm_flash_attn", "install a vLLM built for CUDA, with its FlashAttention extensions"),
        Step("cuda.bindings.driver", "install cuda-bindings, with the packages cuda-pathfinder and typing-extensions"),
        Step("triton", "install the triton that torch asks for"),
        Step("vllm_agentserve.vllm_compat.cuda_worker", OURS),
        Step("vllm_agentserve.scheduler", OURS),
        # What an engine imports late, when it loads a model and chooses its attention.
        Step("vllm.v1.worker.gpu.model_runner", VLLM),
        Step("vllm.model_executor.layers.quantization.online.base", VLLM),
        Step("vllm.model_executor.models.qwen2", VLLM),
        Step("vllm.v1.attention.backends.flash_attn", VLLM),
        Step("vllm.v1.attention.backends.triton_attn", VLLM),
    ),
    "cpu": (
        Step("torch", "install the torch that this vLLM was built for"),
        Step("vllm", VLLM),
        Step("vllm._C", "install a vLLM built for CPUs"),
        Step("vllm_agentserve.scheduler", OURS),
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


def run(place: Place, steps: Sequence[Step] | None = None) -> Finding:
    """The part. Beside it the imports begin in the process that all later children are forked from.

    Args:
        steps: what is imported; None for what the device needs.
    """
    place.starter.prepare(place.device, place.environment)
    wanted = [asdict(step) for step in steps or STEPS[place.device]]
    ended = place.run("imports", f"{PACKAGE}.imports:try_all", {"steps": wanted}, LIMIT_S, fresh=True)
    if ended.error is not None:
        return Finding(ended.status, "the process ended while it imported", ["```", *ended.error.splitlines(), "```"])
    found = ended.result
    page = ["| module | s |", "|---|---:|", *(f"| `{name}` | {took} |" for name, took in found["seconds"].items())]
    if (failed := found["failed"]) is not None:
        return Finding("failed", f"import {failed['module']}: {failed['error']}; {failed['remedy']}", page, found)
    return Finding("ok", f"{len(wanted)} modules", page, found)
