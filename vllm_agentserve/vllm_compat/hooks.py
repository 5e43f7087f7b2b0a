"""What the plugin sets in every process: a field for our figures, an early check of our options, our logger."""

import dataclasses
import logging
from typing import Any

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.hints import read_hints
from vllm_agentserve.vllm_compat import STATS_FIELD, chooses_our_scheduler, is_our_scheduler
from vllm_agentserve.vllm_compat.lanes import choose_lanes

logger = logging.getLogger("vllm.agentserve")


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

    It also adds the connector where lanes are to run.

    Retired by: patches/*/scheduler-cls-check-config.patch.
    """
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config
    if getattr(stock, "agentserve", False):
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_our_scheduler(self.scheduler_cls):
            options = AgentServeConfig.from_additional_config(self.additional_config)
            obstacle = choose_lanes(self, options)
            if obstacle is not None:
                logger.info("agentserve: mode auto runs time-sliced: %s.", obstacle)
        return stock(self, *args, **kwargs)

    create_engine_config.agentserve = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def refuse_wrong_hints() -> None:
    """Makes `InputProcessor.process_inputs` refuse requests with wrong hints, in engines with option `strict_hints`.

    It runs where requests come in, so the client gets status 400 and the engine never hears of the request.
    Retired by: patches/*/scheduler-cls-check-request.patch.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

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
            _, errors = read_hints(getattr(params, "extra_args", None))
            if errors:
                raise VLLMValidationError(f"{errors[0]}.", parameter=f"vllm_xargs.{errors[0].name}")
        return stock(self, request_id, prompt, params, *args, **kwargs)

    process_inputs.agentserve = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


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
