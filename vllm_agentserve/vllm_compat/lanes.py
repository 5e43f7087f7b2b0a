"""Whether two lanes can run, and the connector that carries them."""

import logging
import os
from typing import TYPE_CHECKING, Any

from vllm_agentserve.config import KEY, AgentServeConfig, OptionError
from vllm_agentserve.policy.routes import lanes_may_pay
from vllm_agentserve.policy.slots import core_ladder
from vllm_agentserve.vllm_compat import cuda
from vllm_agentserve.vllm_compat.host import WITHOUT_LANES, is_host

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.agentserve")

CONNECTOR = "LaneConnector"
"""vLLM's name for the one that carries two lanes."""
PARALLEL = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)
"""Arguments of vLLM of which each makes more than one worker."""


def choose_lanes(arguments: Any, options: AgentServeConfig) -> str | None:
    """Adds the connector to these `EngineArgs` where lanes are to run, as `--kv-transfer-config` would. The worker's process does
    not exist yet, or has not started CUDA, so on GPUs its environment is set here too.

    Returns:
        Why mode `auto` runs time-sliced; None where lanes run, or were not asked for.

    Raises:
        OptionError: mode `lanes` cannot run here.
    """
    from vllm.platforms import current_platform

    if options.mode not in ("lanes", "auto"):
        return None
    obstacle = arguments_obstacle(arguments)
    if obstacle is None and options.mode == "auto":
        obstacle = _no_gain(options)
    on_cpu = current_platform.is_cpu()
    if obstacle is None:
        model = arguments.create_model_config()
        obstacle = model_obstacle(model)
        if obstacle is None and not on_cpu:
            obstacle = cuda.engine_obstacle(arguments, model)
    if obstacle is None:
        add_lane_connector(arguments)
        if not on_cpu:
            arguments.worker_cls = cuda.WORKER
            if (shared := cuda.ask_for_queues()) is not None:
                logger.warning("agentserve: %s.", shared)
        return None
    if options.mode == "lanes":
        raise OptionError(
            f"{KEY} option 'mode' = 'lanes' cannot run here: {obstacle}. Use 'auto', which uses what can run."
        )
    return obstacle


def _no_gain(options: AgentServeConfig) -> str | None:
    """Why mode `auto` does without a lane that could run on this device; None if it may pay."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return (
            "on the one GPU they ran on, agents took longer with lanes than without, so lanes have to be asked for with mode "
            "'lanes'"
        )
    return no_gain(options, len(os.sched_getaffinity(0)))


def no_gain(options: AgentServeConfig, cores: int) -> str | None:
    """Why a lane would never be the faster way on so many cores; None if it may be."""
    share = 1 - core_ladder(cores, options.lane_decode_share)[0] / cores
    if lanes_may_pay(None if options.tpot_slo_ms is not None else options.tpot_factor, share):
        return None
    return (
        f"a lane with {share:.0%} of {cores} cores would compute prompts more slowly than steps do; with a 'tpot_slo_ms', or a "
        f"smaller 'tpot_factor' than {options.tpot_factor:g}, steps are shorter, and mode auto chooses for every prompt"
    )


def arguments_obstacle(arguments: Any) -> str | None:
    """Why two lanes cannot run with these `EngineArgs`; None if they can, as far as they tell."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and len(os.sched_getaffinity(0)) < 2:
        return "two lanes need two cores"
    connector = arguments.kv_transfer_config
    if connector is not None and is_host(connector):
        return WITHOUT_LANES
    if connector is not None and connector.kv_connector != CONNECTOR:
        return (
            "--kv-transfer-config names another KV connector, which would be told of none of the blocks the lane fills"
        )
    if arguments.kv_offloading_size is not None:
        return "--kv-offloading-size would replace the lane's KV connector"
    for name in PARALLEL:
        if getattr(arguments, name) > 1:
            return f"--{name.replace('_', '-')} is {getattr(arguments, name)}, and a lane has one worker"
    if arguments.speculative_config is not None:
        return "speculative decoding is on"
    if arguments.enable_lora:
        return "LoRA is on"
    if arguments.worker_extension_cls:
        return "--worker-extension-cls adds calls to the worker that may replace weights while the lane works, as trainers do"
    if current_platform.is_cpu() and arguments.weight_transfer_config is not None:
        return "weights are replaced while the engine runs, and the lane has its own copy"
    if arguments.enable_prefix_caching is False:
        return "prefix caching is off"
    if arguments.enable_chunked_prefill is False:
        return "chunked prefill is off"
    return None


def model_obstacle(model: "ModelConfig") -> str | None:
    """Why two lanes cannot serve this model; None if they can."""
    if model.runner_type != "generate" or model.is_encoder_decoder or model.is_diffusion:
        return "the model does not generate token by token from a prompt of its own"
    if model.is_multimodal_model:
        return "the model takes more than text"
    if model.is_hybrid or model.is_attention_free or model.get_sliding_window() is not None:
        return "layers of the model keep less than the whole context"
    return None


def lane_obstacle(request: "Request") -> str | None:
    """Why the prompt of this request is not for the prefill lane; None if it is."""
    if request.has_encoder_inputs or request.prompt_embeds is not None or request.lora_request is not None:
        return "it is more than token ids"
    parameters = request.sampling_params
    if parameters is None or parameters.prompt_logprobs is not None:
        return "it needs what is computed for its prompt tokens"
    return None


def add_lane_connector(arguments: Any) -> None:
    from vllm.config import KVTransferConfig

    arguments.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="vllm_agentserve.lanes.connector",
        kv_role="kv_consumer",
        kv_load_failure_policy="recompute",
    )


def local_worker_half() -> Any:
    """The worker's half of the lane connector where worker and scheduler share a process; None where they do not."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    return getattr(get_kv_transfer_group(), "half", None) if has_kv_transfer_group() else None
