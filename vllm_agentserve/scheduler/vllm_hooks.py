"""What vLLM would ask a custom scheduler class by itself if our patches were in; until then `hooks.py` asks in its place."""

import logging
from typing import TYPE_CHECKING, Any

from vllm_agentserve.config import KEY, AgentServeConfig, OptionError
from vllm_agentserve.policy.hints import read_hints
from vllm_agentserve.vllm_compat.cpu import choose_worker, shorten_spinning
from vllm_agentserve.vllm_compat.host import add_host
from vllm_agentserve.vllm_compat.lanes import choose_lanes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.agentserve")

MIDDLEWARE = "vllm_agentserve.middleware.ClientNames"


def require_hooks(options: AgentServeConfig, lanes: bool, host: bool, not_asked: set[str], reason: str) -> None:
    """Stops the start of an engine that was asked for what only the hooks do.

    Args:
        options: what was asked for.
        lanes: whether the prefill lane's connector is there.
        host: whether the connector of host memory is there.
        not_asked: the methods of `VllmHooks` that nobody calls.
        reason: why.

    Raises:
        OptionError: an option cannot be fulfilled.
    """
    needs = []
    if options.strict_hints and "check_request" in not_asked:
        needs.append("'strict_hints' = true")
    if options.mode == "lanes" and not lanes and "check_engine_args" in not_asked:
        needs.append("'mode' = 'lanes'")
    if options.kv_host_gib and not host and "check_engine_args" in not_asked:
        needs.append(f"'kv_host_gib' = {options.kv_host_gib:g}")
    if needs:
        raise OptionError(
            f"{KEY} option {' and '.join(needs)} cannot be fulfilled: {reason}. Add it to VLLM_PLUGINS, or unset that variable."
        )


class VllmHooks:
    """Class methods of `AgentScheduler`, each the subject of one patch (patches/README.md)."""

    @classmethod
    def check_engine_args(cls, engine_args: Any) -> None:
        """Checks our options, adds the connector of lanes or host memory where they are to run, and prepares workers on CPUs.

        Raises:
            OptionError: an option is wrong, or lanes or host memory were asked for and cannot be had.
        """
        options = AgentServeConfig.from_additional_config(engine_args.additional_config)
        add_host(engine_args, options)
        obstacle = choose_lanes(engine_args, options)
        if obstacle is not None:
            logger.info("agentserve: mode auto runs time-sliced: %s.", obstacle)
        choose_worker(engine_args, options)
        shorten_spinning(options)

    @classmethod
    def check_request(cls, params: Any, vllm_config: "VllmConfig") -> None:
        """Checks the hints of a request, in engines with option `strict_hints`.

        Raises:
            VLLMValidationError: one is wrong; the client gets status 400.
        """
        from vllm.exceptions import VLLMValidationError

        if not AgentServeConfig.from_additional_config(vllm_config.additional_config).strict_hints:
            return
        _, errors = read_hints(getattr(params, "extra_args", None))
        if errors:
            raise VLLMValidationError(f"{errors[0]}.", parameter=f"vllm_xargs.{errors[0].name}")

    @classmethod
    def api_middleware(cls, additional_config: Any) -> list[str]:
        """The ASGI middleware of an API server, by import path: none with option `client_names` off.

        Wrong options are left to `check_engine_args`, which says so.
        """
        try:
            wanted = AgentServeConfig.from_additional_config(additional_config).client_names
        except OptionError:
            return []
        return [MIDDLEWARE] if wanted else []

    @classmethod
    def make_stat_loggers(cls, vllm_config: "VllmConfig", engine_indexes: list[int], log_lines: bool) -> list[Any]:
        """The logger that puts our figures on `/metrics`, and in the log where lines are wanted."""
        from vllm_agentserve.scheduler.metrics import AgentStatLogger

        return [AgentStatLogger(vllm_config, engine_indexes, log_lines=log_lines)]
