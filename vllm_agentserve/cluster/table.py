"""The table of pins: one for all ingresses of a cluster, in a process of its own."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from vllm_agentserve.cluster.load import Report
from vllm_agentserve.cluster.settings import ClusterSettings

NAMESPACE = "agentserve"
Reports = Mapping[str, Report | None]
"""Engines that can be reached, with what each last said of itself."""


class PinTable:
    """A placement that several ingresses ask.

    Args:
        settings: of the cluster, as `ClusterSettings.mapping` gives them.
        clock: seconds that do not go back.
    """

    def __init__(self, settings: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._placement = ClusterSettings.from_mapping(settings).placement()
        self._clock = clock
        self._engines: dict[str, int] = {}
        """Engines that live, with the number of their last report; 0 before the first."""
        self._gone: dict[str, None] = {}
        self._decisions: dict[str, int] = {}
        self._moves = 0

    def place(
        self,
        session: str,
        tokens: int,
        parent: str | None,
        reports: Reports,
        gone: tuple[str, ...] = (),
        missed: int = 0,
    ) -> tuple[str, str]:
        """The engine of a call, and why; counted as sent there.

        Args:
            session: see `Placement.place`.
            tokens: of its prompt.
            parent: session of the agent that started this one.
            reports: the engines that the asking ingress can reach.
            gone: engines that it could reach, and cannot any more. Their names do not come back.
            missed: calls that it has placed without the table since it last asked.
        """
        now = self._clock()
        self._see(reports, gone, now)
        if missed:
            self._decisions["unreachable"] = self._decisions.get("unreachable", 0) + missed
        decision = self._placement.place(session, tokens, now, parent)
        self._decisions[decision.reason] = self._decisions.get(decision.reason, 0) + 1
        self._moves += decision.moved_from is not None
        return decision.engine, decision.reason

    def turn(self, session: str, tokens: int) -> None:
        """A call of a conversation whose engine its ingress knew."""
        try:
            self.place(session, tokens, None, {})
        except LookupError:
            return  # nothing is known yet, after a restart

    def finished(self, session: str, engine: str, context_tokens: int, last: bool) -> None:
        """A call ended, see `Placement.finished`; `last` if its conversation did too."""
        now = self._clock()
        self._placement.finished(session, engine, context_tokens, now)
        if last:
            self._placement.ended(session, now)

    def shown(self) -> dict[str, Any]:
        """What is on the page of metrics."""
        return {
            "decisions": dict(self._decisions),
            "moves": self._moves,
            "pins": len(self._placement.pins),
            "resident_tokens": {name: self._placement.resident_tokens(name) for name in self._engines},
        }

    def _see(self, reports: Reports, gone: tuple[str, ...], now: float) -> None:
        before = set(self._engines)
        self._gone |= dict.fromkeys(gone)
        for name in reports:
            if name not in self._gone:
                self._engines.setdefault(name, 0)
        for name in gone:
            self._engines.pop(name, None)
        if set(self._engines) != before:
            self._placement.engines(self._engines, now)
        for name, report in reports.items():
            if report is not None and report.number > self._engines.get(name, report.number):
                self._engines[name] = report.number
                self._placement.report(name, report.load, now)
