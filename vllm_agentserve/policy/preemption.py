"""Whose place a waiting call may take, and how much work may be lost to that (Autellix, arXiv 2502.13965, section 4.2)."""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from vllm_agentserve.policy.call import Call


class Rank(NamedTuple):
    """Where a call stands; smaller is better.

    Args:
        batch: whether nobody waits for it.
        level: of its program.
    """

    batch: bool
    level: int


FIRST = Rank(False, 0)
Item = TypeVar("Item")


def victim(waiting: Rank, running: Iterable[tuple[Rank, Item]]) -> Item | None:
    """Who gives up its place: the worst of the running calls, the latest among equals, if it is worse than the one that waits.

    A call that got its place this way is at a better level than the other until it has received twice as much or more, so two
    calls take turns at most once per level.
    """
    worst: tuple[Rank, Item] | None = None
    for rank, call in running:
        if rank > waiting and (worst is None or rank >= worst[0]):
            worst = rank, call
    return worst[1] if worst is not None else None


HORIZON_MS = 300_000.0
"""What service allows to be lost is kept for this much further service: who preempted nobody for an hour may not lose at once
what the hour allowed."""


class PreemptionAccount:
    """Keeps lost work below a share of service: in any stretch of it, at most that share of the stretch and of `HORIZON_MS`
    more is lost. All in ms of the engine's time.

    A preempted call is charged with all it would have to compute, and with what it really had to when it runs again: most of
    it is still in the prefix cache then. Until then what it may lose stands in its `Call.lost_ms`.

    Args:
        share: of service that may be lost; with 0 no call may be preempted.
        horizon_ms: a call that would lose more than the share of this is never preempted.
    """

    def __init__(self, share: float, horizon_ms: float = HORIZON_MS) -> None:
        self._share = share
        self._horizon_ms = horizon_ms
        self._credit_ms = 0.0
        """What may be lost now, less what was lost already; without what is pending."""
        self._pending = 0
        """Preempted calls that have not run again."""
        self._pending_ms = 0.0
        self.service_ms = 0.0
        self.lost_ms = 0.0

    def serve(self, ms: float) -> None:
        """The engine worked so long."""
        self.service_ms += ms
        self._credit_ms = min(self._credit_ms + self._share * ms, self._share * self._horizon_ms)

    def allows(self, worst_ms: float) -> bool:
        """Whether a call that would lose this much may be preempted."""
        return self._pending_ms + worst_ms <= self._credit_ms

    def preempt(self, call: Call, worst_ms: float) -> None:
        """The call gives up its place, and loses so much at most."""
        self.settle(call, 0.0)
        call.lost_ms = worst_ms
        self._pending += 1
        self._pending_ms += worst_ms

    def settle(self, call: Call, ms: float) -> bool:
        """The call runs again, or never will: it lost so much. Returns whether it had been preempted."""
        if call.lost_ms is None:
            return False
        worst_ms, call.lost_ms = call.lost_ms, None
        self._pending -= 1
        self._pending_ms = self._pending_ms - worst_ms if self._pending else 0.0
        self.lost_ms += ms
        self._credit_ms -= ms
        return True
