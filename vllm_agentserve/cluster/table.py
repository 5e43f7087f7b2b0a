"""The table of pins: one for all ingresses of a cluster, in a process of its own."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_agentserve.cluster.load import Report
from vllm_agentserve.cluster.settings import ClusterSettings
from vllm_agentserve.cluster.timings import NONE, Counts, both

NAMESPACE = "agentserve"
UNREACHED_S = 30.0
"""An engine that no ingress has been able to reach for so long does not live."""
NAMED_S = 600.0
"""An engine that is gone is remembered until no ingress has named it for so long."""
BACK_REPORTS = 10
"""An engine that was found gone and has made so many reports since then, one a second, is used again."""
MOST_GONE = 4096
"""Engines that are gone and remembered."""
FAILURES = 16
"""Engines that did not start whose reasons are kept."""
REASON_CHARACTERS = 4000
"""Of a reason, at most."""
Reports = Mapping[str, Report | None]
"""Engines that can be reached, with what each last said of itself."""


@dataclass(frozen=True, slots=True)
class Gone:
    """An engine that an ingress has found gone.

    Args:
        named_s: when it was last named, as gone or as one that can be reached.
        since: number of its first report that came afterwards; None before that.
        number: of its last one.
    """

    named_s: float
    since: int | None = None
    number: int | None = None


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
        self._reached_s: dict[str, float] = {}
        """When an ingress could last reach each of them."""
        self._gone: dict[str, Gone] = {}
        """Engines that are gone, and when an ingress last named each of them, the longest ago first."""
        self._decisions: dict[str, int] = {}
        self._moves = 0
        self._moved_to: dict[str, int] = {}
        self._prefills: dict[str, int] = {}
        self._timings: dict[str, Counts] = {}
        self._failures: deque[tuple[float, str]] = deque(maxlen=FAILURES)

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
        return self._place(session, tokens, now, parent)

    def _place(
        self, session: str, tokens: int, now: float, parent: str | None, known: str | None = None
    ) -> tuple[str, str]:
        decision = self._placement.place(session, tokens, now, parent, known)
        self._decisions[decision.reason] = self._decisions.get(decision.reason, 0) + 1
        if decision.moved_from is not None:
            self._moves += 1
            self._moved_to[decision.engine] = self._moved_to.get(decision.engine, 0) + 1
        return decision.engine, decision.reason

    def turn(self, session: str, tokens: int, engine: str) -> None:
        """A call of a conversation whose engine its ingress knew. A table that has started again learns it from this."""
        try:
            self._place(session, tokens, self._clock(), None, engine)
        except LookupError:
            return  # nothing is known yet, after a restart

    def finished(self, session: str, engine: str, context_tokens: int, last: bool) -> None:
        """A call ended, see `Placement.finished`; `last` if its conversation did too."""
        now = self._clock()
        self._placement.finished(session, engine, context_tokens, now)
        if last:
            self._placement.ended(session, now)

    def prefilled(self, outcome: str) -> None:
        """A prefiller was asked for a prompt, see `OUTCOMES` of `prefill.py`."""
        self._prefills[outcome] = self._prefills.get(outcome, 0) + 1

    def timed(self, timings: Mapping[str, Counts]) -> None:
        """Decisions took so long, by whether the table was asked."""
        for name, counts in timings.items():
            self._timings[name] = both(self._timings.get(name, NONE), counts)

    def failed(self, reason: str) -> None:
        """An engine did not start."""
        self._failures.append((self._clock(), reason[:REASON_CHARACTERS]))

    def first_failure(self, within_s: float) -> str:
        """Why the first engine of those that did not start in the last seconds did not; "" if there was none."""
        since = self._clock() - within_s
        return next((reason for failed_s, reason in self._failures if failed_s >= since), "")

    def shown(self) -> dict[str, Any]:
        """What is on the page of metrics."""
        return {
            "decisions": dict(self._decisions),
            "moves": self._moves,
            "prefills": dict(self._prefills),
            "timings": dict(self._timings),
            "pins": len(self._placement.pins),
            "resident_tokens": {name: self._placement.resident_tokens(name) for name in self._engines},
            "engine_pins": {name: self._placement.conversations(name) for name in self._engines},
            "engine_moves": {name: self._moved_to.get(name, 0) for name in self._engines},
        }

    def _see(self, reports: Reports, gone: tuple[str, ...], now: float) -> None:
        before = set(self._engines)
        self._remember_gone(reports, gone, now)
        for name in reports:
            if name not in self._gone:
                self._engines.setdefault(name, 0)
                self._reached_s[name] = now
        # Whoever knew that they have ended may be gone too, as after a new deployment.
        unreached = [name for name, reached_s in self._reached_s.items() if now - reached_s > UNREACHED_S]
        for name in (*gone, *(unreached if reports else ())):
            self._engines.pop(name, None)
            self._reached_s.pop(name, None)
            self._moved_to.pop(name, None)
        if set(self._engines) != before:
            self._placement.engines(self._engines, now)
        for name, report in reports.items():
            if report is not None and report.number > self._engines.get(name, report.number):
                self._engines[name] = report.number
                self._placement.report(name, report.load, now)

    def _remember_gone(self, reports: Reports, gone: tuple[str, ...], now: float) -> None:
        """An engine that one ingress has found gone may be among those of another one for a while. One that goes on reporting
        was not gone: it refused for a moment."""
        for name in gone:
            self._gone.pop(name, None)
            self._gone[name] = Gone(now)
        for name in [name for name in reports if name in self._gone and name not in gone]:
            entry, report = self._gone.pop(name), reports[name]
            number = entry.number if report is None else report.number
            since = entry.since if entry.since is not None else number
            if since is not None and number is not None and number - since >= BACK_REPORTS:
                continue
            self._gone[name] = Gone(now, since, number)
        while self._gone:
            name, entry = next(iter(self._gone.items()))
            if now - entry.named_s <= NAMED_S and len(self._gone) <= MOST_GONE:
                break
            del self._gone[name]
