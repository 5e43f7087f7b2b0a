"""Messages in the engine's log: one at start, and one for each thing that cannot be applied."""

from logging import Logger

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.hints import HEADER, LOGGED, HintError

MODES = {
    (True, True, True): "auto (for each prompt the faster of lanes and steps)",
    (True, True, False): "lanes",
    (False, True, True): "auto (time-sliced here)",
    (False, True, False): "time-sliced",
}
"""By: is there a lane, are prefills cut, is the mode `auto`. Anything else is `stock`."""


HOOKS = {
    "check_engine_args": "the check of options before the model is loaded, and the prefill lane of mode 'auto'",
    "check_request": "the check of requests where they come in",
    "api_middleware": "names of sessions in forms other than ours",
    "make_stat_loggers": "our series on /metrics",
}
"""What each hook is for."""


class LogMessages:
    """Args: logger: vLLM's, so that our lines look like its own."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._not_cut: set[str] = set()
        self._invalid: set[str] = set()

    def startup(
        self,
        options: AgentServeConfig,
        lane: bool,
        asynchronous: bool,
        budget_obstacle: str | None,
        order_obstacle: str | None,
    ) -> None:
        """Logs mode, scheduling, target and policy, and the reason for each of them that does not apply."""
        self._logger.info(
            "agentserve: mode %s, %s scheduling, TPOT target %s, policy %s.",
            MODES.get((lane, budget_obstacle is None, options.mode == "auto"), "stock"),
            "asynchronous" if asynchronous else "synchronous",
            "calibrated" if options.tpot_slo_ms is None else f"{options.tpot_slo_ms:g} ms",
            options.policy if order_obstacle is None else "vLLM's own",
        )
        if budget_obstacle is not None:
            self._logger.warning("agentserve: prefills are not cut to the TPOT target: %s.", budget_obstacle)
        if order_obstacle is not None:
            self._logger.warning("agentserve: waiting requests are in vLLM's order: %s.", order_obstacle)

    def without_plugin(self, not_asked: set[str], reason: str) -> None:
        """Warns that parts of this package are not in use, because vLLM has not loaded its plugin."""
        parts = ", ".join(text for name, text in HOOKS.items() if name in not_asked)
        self._logger.warning("agentserve: %s, so these are missing: %s.", reason, parts)

    def prefill_not_cut(self, obstacle: str) -> None:
        """Warns, once per reason, that prompts are not cut to their budget."""
        if obstacle not in self._not_cut:
            self._not_cut.add(obstacle)
            self._logger.warning("agentserve: a prompt is not cut to the TPOT target because %s.", obstacle)

    def invalid_hint(self, error: HintError) -> None:
        """Warns that a hint is ignored, once per hint name. All unknown names count as one, all headers too; the first is named.

        The client's value is not logged. Of a name no more is than `HintError` keeps, without control characters.
        """
        header = error.name.startswith(HEADER)
        kind = HEADER if header else error.name if error.name in LOGGED else ""
        if kind not in self._invalid:
            self._invalid.add(kind)
            self._logger.warning(
                "agentserve: a hint is ignored: %s must be %s. Further hints of this kind are only counted.",
                f"header {error.name.removeprefix(HEADER)!r}" if header else f"vllm_xargs[{error.name!r}]",
                error.allowed,
            )
