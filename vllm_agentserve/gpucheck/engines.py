"""The engines of the check: real vLLM in this process, stock or with our scheduler, over a model that needs no download."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_agentserve.config import SERIES
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
class ModelShape:
    """A dense decoder by its sizes.

    Args:
        least_gib: free GPU memory from which on it is chosen; weights in bf16, a KV cache and room for lanes.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    least_gib: float


SHAPES = (
    ModelShape("qwen2.5-7b", 3584, 18944, 28, 28, 4, 152064, 30.0),
    ModelShape("qwen2.5-3b", 2048, 11008, 36, 16, 2, 151936, 15.0),
    ModelShape("qwen2.5-1.5b", 1536, 8960, 28, 12, 2, 151936, 9.0),
    ModelShape("qwen2.5-0.5b", 896, 4864, 24, 14, 2, 151936, 0.0),
)
"""Sizes of the published models, the largest first."""
UNTIED_HIDDEN = 3584
"""From this hidden size on a model has two embedding matrices."""
TOY = ModelShape("toy", 384, 1536, 6, 6, 2, 4096, 0.0)


def shape_for(free_gib: float | None) -> ModelShape:
    """The largest shape for so much free GPU memory; the toy without a GPU."""
    if free_gib is None:
        return TOY
    return next(shape for shape in SHAPES if free_gib >= shape.least_gib)


def kv_cache_bytes(free_gib: float | None) -> int:
    """The same KV cache for every arm: 2 GiB without a GPU, else a fifth of its free memory, from 1 to 8 GiB."""
    return 2 << 30 if free_gib is None else int(min(max(free_gib / 5, 1.0), 8.0) * 2**30)


def kv_block_bytes(shape: ModelShape, block: int) -> int:
    """The size of a block of so many tokens in a KV cache in bfloat16."""
    values = 2 * shape.layers * shape.kv_heads * shape.hidden // shape.heads
    return 2 * values * block


def kv_cache_blocks(shape: ModelShape, size: int, block: int) -> int:
    """How many blocks of so many tokens a KV cache of `size` bytes in bfloat16 has."""
    return size // kv_block_bytes(shape, block)


def weight_bytes(shape: ModelShape) -> int:
    """The size of the weights in bfloat16; small models use one matrix for both embeddings."""
    inside = 2 * shape.hidden + 2 * (shape.hidden // shape.heads) * shape.kv_heads
    embeddings = (1 if shape.hidden < UNTIED_HIDDEN else 2) * shape.vocabulary * shape.hidden
    return 2 * (embeddings + shape.layers * shape.hidden * (inside + 3 * shape.inner))


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


def write_config(shape: ModelShape, folder: Path) -> Path:
    """Writes the configuration of a dummy model; returns its folder."""
    model = folder / shape.name
    model.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": shape.hidden < UNTIED_HIDDEN,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    (model / "config.json").write_text(json.dumps(config, indent=1))
    return model


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
