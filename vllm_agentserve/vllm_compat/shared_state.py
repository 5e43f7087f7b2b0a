"""What two model runners over one module would both write: known from vLLM's sources, setting by setting.

Both lanes call the same layers at the same time, on two streams. Whatever a layer, a kernel library or vLLM keeps outside the
runner and writes in a forward pass is then written by both at once. What comes from vLLM's workspace manager is safe: each lane
has its own there.
"""

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

LINEAR_BACKENDS = ("auto", "torch", "triton")
"""Kernels of layers that are not quantised whose memory PyTorch allocates anew for every call."""
SCRATCH = re.compile(r"(^|_)(workspace|scratch|buf|buffer|locks?)s?$")
"""Names of tensors that vLLM's layers keep to write into."""


@dataclass(frozen=True)
class Settings:
    """The part of a configuration that decides what two lanes share, read from `EngineArgs` or from a `VllmConfig`.

    Attributes:
        model: vLLM's configuration of it.
        dual_batch: whether dual-batch overlap is on.
        micro_batches: into how many a batch is split; 0 and 1 mean none.
        fast_prefill: whether prefill skips layers that share a KV cache.
        compilation: vLLM's `CompilationConfig`.
        offload_backend: where offloaded weights are read from; 'auto' follows from the sizes.
        offload_group: layers of a group of which some are prefetched; 0 for none.
        moe_backend, linear_backend: kernels of experts and of linear layers.
        weight_transfer: how weights are replaced while the engine runs, None if they are not.
        routed_experts: whether answers say which experts were used.
        expert_balancing: whether experts are moved by their load.
    """

    model: "ModelConfig"
    dual_batch: bool
    micro_batches: int
    fast_prefill: bool
    compilation: Any
    offload_backend: str
    offload_group: int
    moe_backend: str
    linear_backend: str
    weight_transfer: Any
    routed_experts: bool
    expert_balancing: bool


def settings_of_arguments(arguments: Any, model: "ModelConfig") -> Settings:
    """As vLLM will resolve them: of the two places for a kernel backend, the argument of its own wins."""
    kernels = arguments.kernel_config
    return Settings(
        model=model,
        dual_batch=arguments.enable_dbo,
        micro_batches=arguments.ubatch_size,
        fast_prefill=arguments.kv_sharing_fast_prefill,
        compilation=arguments.compilation_config,
        offload_backend=arguments.offload_backend,
        offload_group=arguments.offload_group_size,
        moe_backend=kernels.moe_backend if arguments.moe_backend == "auto" else arguments.moe_backend,
        linear_backend=kernels.linear_backend if arguments.linear_backend == "auto" else arguments.linear_backend,
        weight_transfer=arguments.weight_transfer_config,
        routed_experts=arguments.enable_return_routed_experts
        or arguments.aux_output_config.enable_return_routed_experts,
        expert_balancing=arguments.enable_eplb,
    )


def settings_of_config(vllm_config: "VllmConfig") -> Settings:
    parallel, offload = vllm_config.parallel_config, vllm_config.offload_config
    return Settings(
        model=vllm_config.model_config,
        dual_batch=parallel.enable_dbo,
        micro_batches=parallel.ubatch_size,
        fast_prefill=vllm_config.cache_config.kv_sharing_fast_prefill,
        compilation=vllm_config.compilation_config,
        offload_backend=offload.offload_backend,
        offload_group=offload.prefetch.offload_group_size,
        moe_backend=vllm_config.kernel_config.moe_backend,
        linear_backend=vllm_config.kernel_config.linear_backend,
        weight_transfer=vllm_config.weight_transfer_config,
        routed_experts=vllm_config.aux_output_config.enable_return_routed_experts,
        expert_balancing=parallel.enable_eplb,
    )


def shared_state_obstacle(settings: Settings, capability: int) -> str | None:
    """The first thing that two lanes would both write with these settings, and what to do; None if nothing is known.

    Args:
        settings: of the engine.
        capability: compute capability of the GPU, major part; it decides which kernels vLLM chooses by itself.
    """
    return kernels_obstacle(settings, capability) or weights_obstacle(settings) or batch_obstacle(settings)


def kernels_obstacle(settings: Settings, capability: int) -> str | None:
    model = settings.model
    if model.quantization is not None:
        # Marlin and Humming keep locks per layer; some FP8, FP4 and mixed-precision kernels a workspace per process.
        return f"kernels of quantization {model.quantization!r} may keep scratch memory that two lanes would both write"
    if settings.linear_backend not in LINEAR_BACKENDS:
        return (
            f"kernels of --linear-backend {settings.linear_backend} may keep scratch memory that two lanes would both write: "
            "leave it out"
        )
    if not model.is_moe:
        return None
    if os.environ.get("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "0") in ("", "0"):
        return "shared experts run on one more stream for both lanes: set VLLM_DISABLE_SHARED_EXPERTS_STREAM=1"
    if settings.expert_balancing:
        return (
            "expert load balancing moves weights, and counts tokens in buffers that two lanes would both write: leave out "
            "--enable-eplb"
        )
    if settings.routed_experts:
        return "routed experts are captured in one buffer for both lanes: leave out --enable-return-routed-experts"
    # Of itself vLLM takes Triton for experts on Hopper, and FlashInfer elsewhere where it is installed.
    if settings.moe_backend != "triton" and not (settings.moe_backend == "auto" and capability == 9):
        return (
            f"expert kernels of --moe-backend {settings.moe_backend} may keep scratch memory that two lanes would both write: "
            "set --moe-backend triton"
        )
    return None


def weights_obstacle(settings: Settings) -> str | None:
    """Offloading as vLLM's `create_offloader` chooses it. UVA is no obstacle: the lanes read pinned memory in place, or copy it
    into memory that each allocates for its own stream."""
    prefetches = settings.offload_backend == "auto" and settings.offload_group > 0
    if settings.offload_backend == "prefetch" or prefetches:
        return (
            "prefetched weights pass through buffers that all forward passes share, so a lane would compute with layers "
            "fetched for the other: offload with --cpu-offload-gb, or not at all"
        )
    if settings.weight_transfer is not None:
        return "weights are replaced while the engine runs, and a chunk of the lane may be reading them"
    if settings.model.enable_sleep_mode:
        return "sleep mode unmaps memory that a lane may be using"
    return None


def batch_obstacle(settings: Settings) -> str | None:
    if settings.dual_batch:
        return "dual-batch overlap has streams of its own"
    if settings.micro_batches > 1:
        return "micro-batches have streams and threads of their own: leave out --ubatch-size"
    if settings.fast_prefill:
        return "fast prefill over shared KV layers skips what the lane computes"
    mode = settings.compilation.mode
    if mode is not None and mode.name == "STOCK_TORCH_COMPILE":
        return "compilation mode STOCK_TORCH_COMPILE would compile the model once per runner"
    if settings.compilation.cudagraph_copy_inputs:
        return "cudagraph_copy_inputs copies the inputs of both lanes into the same buffers: leave it out"
    return None


def model_obstacle(model: Any) -> str | None:
    """What the layers of a loaded model keep that two lanes would both write, or queue work on; None if there is nothing.

    Parameters, registered buffers and the KV cache are not meant: vLLM writes the first two when weights are loaded only. A
    stream that both lanes use runs on the whole device, and memory that one lane frees on it may go to the other while the first
    still reads it.
    """
    import torch
    from vllm.utils import torch_utils

    for layer, module in model.named_modules():
        # What vLLM took in the end; it passes over Triton where that does not support the layer.
        experts = getattr(getattr(module, "quant_method", module), "unquantized_backend", None)
        if experts is not None and experts.name != "TRITON":
            return f"experts of {layer} run on {experts.value}, which may keep scratch memory: set --moe-backend triton"
        for name, value in vars(module).items():
            held = value if isinstance(value, list | tuple) else [value]
            place = f"{layer}.{name}" if layer else name
            if SCRATCH.search(name) and any(isinstance(one, torch.Tensor) for one in held):
                return f"the model keeps scratch memory in {place}, which two lanes would both write"
            if any(isinstance(one, torch.Stream | torch.cuda.Stream) for one in held):
                return (
                    f"the model runs a part of its work on a stream of its own in {place}, which both lanes would share"
                )
    if torch_utils._aux_stream is not None:
        return "a layer of the model uses vLLM's auxiliary stream, which both lanes would share"
    return None
