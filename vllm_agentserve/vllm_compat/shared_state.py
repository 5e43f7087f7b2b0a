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

BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
"""Attention backends that keep their buffers in the metadata builder, which every runner has its own of."""
FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""Types of the KV cache that FlashInfer takes, so that vLLM chooses it where FLASH_ATTN does not take them."""
SHARED_EXPERTS = re.compile(r"shared_(experts?|intermediate)(_|$)")
"""Names in a model's configuration whose number says that there are experts for all tokens."""
LINEAR_BACKENDS = ("auto", "torch", "triton")
"""Kernels of layers that are not quantised whose memory PyTorch allocates anew for every call."""
STREAM_VARIABLE = "VLLM_DISABLE_SHARED_EXPERTS_STREAM"
SCRATCH = re.compile(r"(^|_)(workspace|scratch|buf|buffer|locks?)s?$")
"""Names of tensors that vLLM's layers keep to write into."""


@dataclass(frozen=True)
class Settings:
    """The part of a configuration that decides what two lanes share, read from `EngineArgs` or from a `VllmConfig`.

    Attributes:
        model: vLLM's configuration of it.
        attention_backend: name of the one that is asked for, None where vLLM chooses.
        kv_dtype: type of the KV cache as vLLM names it; 'auto' follows from the model.
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
    attention_backend: str | None
    kv_dtype: str
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
        attention_backend=backend_name(arguments.attention_backend or arguments.attention_config.backend),
        kv_dtype=arguments.kv_cache_dtype,
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
        attention_backend=backend_name(vllm_config.attention_config.backend),
        kv_dtype=vllm_config.cache_config.cache_dtype,
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


def backend_name(backend: Any) -> str | None:
    """Of an attention backend, which vLLM takes as a member of an enumeration or as text; None where vLLM chooses."""
    name = str(getattr(backend, "name", backend)).upper()
    return None if backend is None or name == "AUTO" else name


def shared_state_obstacle(settings: Settings, capability: int) -> str | None:
    """The first thing that two lanes would both write with these settings, and what to do; None if nothing is known.

    Args:
        settings: of the engine.
        capability: compute capability of the GPU, major part; it decides which kernels vLLM chooses by itself.
    """
    return (
        attention_obstacle(settings, capability)
        or kernels_obstacle(settings, capability)
        or weights_obstacle(settings)
        or batch_obstacle(settings)
    )


def attention_obstacle(settings: Settings, capability: int) -> str | None:
    """What is known before the weights are loaded. With a capability of 0, which is not known, only a backend that is asked for
    counts. FLASH_ATTN takes FP8 on Hopper; on 10.x its newest version does, which an installation may lack."""
    fp8 = settings.kv_dtype in FP8
    flash = not fp8 or capability == 0 or (capability == 9 and settings.kv_dtype != "fp8_e5m2")
    if flash:
        remedy = "set --attention-backend FLASH_ATTN"
    elif capability == 8:
        remedy = (
            "set --attention-backend TRITON_ATTN, which takes it from compute capability 8.9 on, or leave out "
            "--kv-cache-dtype"
        )
    else:
        remedy = "set --attention-backend TRITON_ATTN"
    if settings.attention_backend is not None:
        if settings.attention_backend not in BACKENDS:
            return (
                f"attention backend {settings.attention_backend} may keep scratch memory that two lanes would both write: "
                f"{remedy}"
            )
        return None
    if not flash:
        return (
            f"with --kv-cache-dtype {settings.kv_dtype} vLLM chooses attention backend FLASHINFER on this GPU, which keeps "
            f"scratch memory that two lanes would both write: {remedy}"
        )
    if capability == 10:
        return (
            "vLLM chooses attention backend FLASHINFER by itself on this GPU, which keeps scratch memory that two lanes would "
            f"both write: {remedy}"
        )
    return None


def shared_experts(model: "ModelConfig") -> str | None:
    """The name in the model's configuration that tells of experts for all tokens; None where none does, which a model may have
    nevertheless: `model_obstacle` looks at its layers."""
    for name, value in vars(model.hf_text_config).items():
        if SHARED_EXPERTS.search(name) and isinstance(value, int) and value > 0:
            return name
    return None


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
    if os.environ.get(STREAM_VARIABLE, "0") in ("", "0") and (name := shared_experts(model)) is not None:
        return f"shared experts ({name} of the model) run on one more stream for both lanes: set {STREAM_VARIABLE}=1"
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
        return "dual-batch overlap uses separate streams"
    if settings.micro_batches > 1:
        return "micro-batches use separate streams and threads: leave out --ubatch-size"
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
                    f"the model runs a part of its work on a separate stream in {place}, which both lanes would share; if "
                    f"that is the one of shared experts, set {STREAM_VARIABLE}=1"
                )
    if torch_utils._aux_stream is not None:
        return "a layer of the model uses vLLM's auxiliary stream, which both lanes would share"
    return None
