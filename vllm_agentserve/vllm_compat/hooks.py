"""What the plugin sets in every process: a field for our figures, an early check of our options, our logger, our middleware.

Each does nothing where vLLM asks the scheduler class itself, as it does with our patches.
"""

import dataclasses
import os
from typing import Any, Protocol

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.vllm_compat import STATS_FIELD, chooses_our_scheduler, is_our_scheduler

PLUGIN = "agentserve"
"""The plugin's name among vLLM's (`pyproject.toml`), by which `VLLM_PLUGINS` chooses."""


class SchedulerHooks(Protocol):
    """What vLLM would ask a scheduler class (`scheduler/vllm_hooks.py`)."""

    def check_engine_args(self, engine_args: Any) -> None: ...

    def check_request(self, params: Any, vllm_config: Any) -> None: ...

    def api_middleware(self, additional_config: Any) -> list[str]: ...

    def make_stat_loggers(self, vllm_config: Any, engine_indexes: list[int], log_lines: bool) -> list[Any]: ...


def asked_upstream(name: str) -> bool:
    """Whether this vLLM calls that class method of custom schedulers by itself."""
    from vllm.v1.core.sched.interface import SchedulerInterface

    return hasattr(SchedulerInterface, name)


def plugin_obstacle() -> str | None:
    """Why vLLM does not load the plugin in processes with this environment, as far as `VLLM_PLUGINS` says; None if it may."""
    named = os.environ.get("VLLM_PLUGINS")
    if named is None or PLUGIN in named.split(","):
        return None
    return f"VLLM_PLUGINS={named!r} leaves out {PLUGIN!r}"


def not_asked() -> set[str]:
    """The class methods of our scheduler that nobody calls in this process, since vLLM has not loaded the plugin in it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.metrics.loggers import StatLoggerManager

    ours: dict[str, Any] = {
        "check_engine_args": EngineArgs.create_engine_config,
        "check_request": InputProcessor.process_inputs,
        "api_middleware": EngineArgs.from_cli_args,
        "make_stat_loggers": StatLoggerManager.__init__,
    }
    return {name for name, hook in ours.items() if not (getattr(hook, "agentserve", False) or asked_upstream(name))}


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


def check_options_early(asks: SchedulerHooks) -> None:
    """Makes `EngineArgs.create_engine_config` check our options, so that a wrong one stops before the model is loaded.

    It also adds the connector where lanes are to run.

    Retired by: patches/*/scheduler-cls-check-engine-args.patch.
    """
    from vllm.engine.arg_utils import EngineArgs

    if asked_upstream("check_engine_args"):
        return
    stock = EngineArgs.create_engine_config
    if getattr(stock, "agentserve", False):
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_our_scheduler(self.scheduler_cls):
            asks.check_engine_args(self)
        return stock(self, *args, **kwargs)

    create_engine_config.agentserve = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def refuse_invalid_hints(asks: SchedulerHooks) -> None:
    """Makes `InputProcessor.process_inputs` refuse requests with wrong hints, in engines with option `strict_hints`.

    It runs where requests come in, so the client gets status 400 and the engine never hears of the request.
    Retired by: patches/*/scheduler-cls-check-request.patch.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    if asked_upstream("check_request"):
        return
    stock = InputProcessor.process_inputs
    if getattr(stock, "agentserve", False):
        return

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        strict = self.__dict__.get("agentserve_strict")
        if strict is None:
            config = self.vllm_config
            strict = self.agentserve_strict = (
                chooses_our_scheduler(config)
                and AgentServeConfig.from_additional_config(config.additional_config).strict_hints
            )
        if strict:
            asks.check_request(params, self.vllm_config)
        return stock(self, request_id, prompt, params, *args, **kwargs)

    process_inputs.agentserve = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def add_middleware(asks: SchedulerHooks) -> None:
    """Makes `EngineArgs.from_cli_args` name our middleware among the server's, where our scheduler is chosen.

    The API server builds its application from the same arguments afterwards. The entry point group `vllm.endpoint_plugins` is not
    used: it loads only what `VLLM_PLUGINS` names, and warns of it in every other server.
    Retired by: patches/*/scheduler-cls-api-middleware.patch.
    """
    from vllm.engine.arg_utils import EngineArgs

    if asked_upstream("api_middleware"):
        return
    stock = EngineArgs.__dict__["from_cli_args"].__func__
    if getattr(stock, "agentserve", False):
        return

    def from_cli_args(cls: Any, args: Any) -> Any:
        middleware = getattr(args, "middleware", None)
        if isinstance(middleware, list) and is_our_scheduler(getattr(args, "scheduler_cls", None)):
            wanted = asks.api_middleware(getattr(args, "additional_config", None))
            args.middleware = [*middleware, *(name for name in wanted if name not in middleware)]
        return stock(cls, args)

    from_cli_args.agentserve = True  # type: ignore[attr-defined]
    EngineArgs.from_cli_args = classmethod(from_cli_args)


def add_stat_logger(asks: SchedulerHooks) -> None:
    """Makes vLLM's `StatLoggerManager` feed our logger too, in engines that run our scheduler and log statistics.

    The entry point group `vllm.stat_logger_plugins` is not used: a logger found there turns statistics on in every engine
    of the machine, also where the user has turned them off and has not chosen our scheduler.
    Retired by: patches/*/scheduler-cls-stat-loggers.patch.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    if asked_upstream("make_stat_loggers"):
        return
    stock = StatLoggerManager.__init__
    if getattr(stock, "agentserve", False):
        return

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, vllm_config, *args, **kwargs)
        if chooses_our_scheduler(vllm_config):
            # vLLM writes no log lines where several API servers share an engine: each would know only its part.
            quiet = kwargs.get("client_count", 1) > 1 or not kwargs.get("enable_default_loggers", True)
            self.stat_loggers += asks.make_stat_loggers(vllm_config, self.engine_indexes, log_lines=not quiet)

    init.agentserve = True  # type: ignore[attr-defined]
    StatLoggerManager.__init__ = init
