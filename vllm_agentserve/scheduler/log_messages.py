"""What the engine's log says of us: once at start, and once for everything that had to be left as it is."""

from logging import Logger

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.hints import KNOWN, HintError

MODES = {
    (True, True, True): "auto (lanes and steps, whichever reads a prompt faster)",
    (True, True, False): "lanes",
    (False, True, True): "auto, which is time-sliced here",
    (False, True, False): "time-sliced",
}
"""By whether there is a lane, whether prefills are cut, and whether the mode is `auto`; `stock` otherwise."""


class LogMessages:
    """Args: logger: vLLM's, so that lines look like its own."""

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
        """Says mode, scheduling, target and order, and why something of it does not apply."""
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
            self._logger.warning("agentserve: waiting requests keep vLLM's order: %s.", order_obstacle)

    def prefill_not_cut(self, obstacle: str) -> None:
        """Says, once per reason, that a prompt is longer than its budget."""
        if obstacle not in self._not_cut:
            self._not_cut.add(obstacle)
            self._logger.warning("agentserve: a prompt is not cut to the TPOT target because %s.", obstacle)

    def invalid_hint(self, error: HintError) -> None:
        """Says, once per hint, that it is ignored; all unknown ones are one kind. What the client sent stays out of the log."""
        kind = error.name if error.name in KNOWN else ""
        if kind not in self._invalid:
            self._invalid.add(kind)
            self._logger.warning(
                "agentserve: a hint is ignored: vllm_xargs[%s] must be %s. Further ones of this kind are only counted.",
                repr(kind) if kind else "'agent_...'",
                error.allowed,
            )
