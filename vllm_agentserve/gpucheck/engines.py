"""The engines of the check: real vLLM in this process, stock or with our scheduler, over a model that needs no download."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_agentserve.config import SERIES
from vllm_agentserve.shapes import SHAPES, TOY, write_config
from vllm_agentserve.toy import make_toy_model
from vllm_agentserve.vllm_compat import SCHEDULER_NAME

PRIORITY = "priority"
"""The arm of `PlainLadder`, which the check puts in the place of green contexts; users do not have it."""
MODES = {"time-sliced": "time-sliced", "lanes": "lanes", PRIORITY: "lanes"}
"""The mode of our scheduler, by arm."""
OURS = tuple(MODES)
STOCK = ("stock", "stock-chunk")
GRAPH_SIZES = (1, 2, 4, 8)
"""Decode batches that are CUDA graphs: agents are few, and every size takes start-up time."""
GRAPH_TOKENS = 512
"""The largest step that is a CUDA graph where the model is compiled: vLLM's default for a server with at least 256 places, but on
GPUs of compute capability 10, where it is larger."""
CONTROL_CHUNK = 256
"""Prompt tokens per step of the arm `stock-chunk`: stock vLLM against itself, with other rounding."""


@dataclass(frozen=True)
class Setting:
    """One engine.

    Args:
        arm: one of `STOCK` or `OURS`.
        model: "toy" (real random weights) or a name of `SHAPES` (vLLM's dummy weights).
        folder: where the configuration of a dummy model is written.
        graphs: whether decode steps are CUDA graphs.
        options: ours, for the arms that have them.
        engine: further arguments of `LLM`.
        graph_sizes: decode batches that are CUDA graphs.
        compiled: whether `graphs` are vLLM's own: the model is compiled, and steps of up to `GRAPH_TOKENS` tokens are graphs.
    """

    arm: str
    model: str
    dtype: str
    device: str
    folder: str
    graphs: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    graph_sizes: Sequence[int] = GRAPH_SIZES
    compiled: bool = False


def engine_arguments(setting: Setting) -> dict[str, Any]:
    """The arguments of `LLM`, without the model.

    Raises:
        ValueError: the arm is unknown.
    """
    if setting.arm not in (*STOCK, *OURS):
        raise ValueError(f"arm {setting.arm!r} is unknown: choose one of {', '.join((*STOCK, *OURS))}")
    given: dict[str, Any] = {
        "dtype": setting.dtype,
        "skip_tokenizer_init": True,
        "seed": 0,
        # Our counters are read from vLLM's public metrics, so every arm collects them.
        "disable_log_stats": False,
        "load_format": "auto" if setting.model == TOY.name else "dummy",
        **setting.engine,
    }
    if setting.device == "cuda":
        # FlashAttention has no float32; and the choice is the same on every GPU.
        given["attention_config"] = {"backend": "TRITON_ATTN" if setting.dtype == "float32" else "FLASH_ATTN"}
        # Where the size of the KV cache is given, this is only how much must be free at start.
        given.setdefault("gpu_memory_utilization", 0.3)
    if setting.device == "cuda" and setting.graphs and setting.compiled:
        given["compilation_config"] = {"max_cudagraph_capture_size": GRAPH_TOKENS}
    elif setting.device == "cuda" and setting.graphs:
        given["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(setting.graph_sizes),
        }
    else:
        given["enforce_eager"] = True
    if setting.arm == "stock-chunk":
        given["max_num_batched_tokens"] = CONTROL_CHUNK
    if setting.arm in OURS:
        given["scheduler_cls"] = SCHEDULER_NAME
        given["additional_config"] = {"agentserve": {"mode": MODES[setting.arm], **setting.options}}
    return given


def variables(setting: Setting) -> dict[str, str]:
    """Environment variables of its process: engines that start at the same time must not write the same compiled code."""
    return {"VLLM_CACHE_ROOT": str(Path(setting.folder) / "compiled")} if setting.compiled else {}


def make_engine(setting: Setting) -> Any:
    """A `vllm.LLM`. In a child process, which ends with it."""
    from vllm import LLM

    from vllm_agentserve import plugin

    os.environ.update(variables(setting))
    # vLLM finds the plugin by itself where it is installed; a bare source tree on the path has no entry points.
    plugin.register()
    if setting.model == TOY.name:
        model = make_toy_model()
    else:
        model = write_config(next(one for one in SHAPES if one.name == setting.model), Path(setting.folder))
    return LLM(str(model), **engine_arguments(setting))


def counters() -> dict[str, float]:
    """Our counters so far (`scheduler.stats.COUNTERS`) of the engine in this process; empty for stock. Complete once no request
    runs. Not read by vLLM's own reader, which makes whole numbers even of seconds."""
    from prometheus_client import REGISTRY

    values: dict[str, float] = {}
    for metric in REGISTRY.collect():
        if metric.type == "counter" and metric.name.startswith(SERIES):
            for sample in metric.samples:
                if sample.name == f"{metric.name}_total":
                    value = int(sample.value) if sample.value.is_integer() else sample.value
                    values[metric.name.removeprefix(SERIES)] = value
    return values


def unused(counts: Mapping[str, float]) -> str | None:
    """Why an arm with a lane says nothing about lanes: no prompt went there, or the lane failed on some, which steps then
    computed; None when the lane did its work."""
    if not counts.get("lane_requests"):
        return "no prompt went to the lane"
    if failed := counts.get("lane_failed_requests"):
        return f"the lane failed on {failed:.0f} of {counts['lane_requests']:.0f} prompts"
    return None
