"""Steady traffic: sessions that begin at random moments, at a rate that does not depend on how they are served."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.sessions import AGENTS, ONE_SHOT, Session

LEAD_SHARE = 0.2
"""Of the sessions: the first ones, which find a server with less to do than those that follow, and are in no figure."""
ENOUGH_SESSIONS = 12
"""With fewer, their number says nothing of whether it grows."""
GROWTH, GROWTH_SESSIONS = 1.5, 2.0
"""The number of sessions under way grows without end if it is so many times as large at the end of the arrivals, and larger by so
many."""


@dataclass(frozen=True)
class Arrivals:
    """How fast sessions arrive.

    Args:
        seed: of the moments; they are the same in every arm and round, and at another rate closer together or further apart.
        per_s: sessions per second.
        load: instead, as a share of what the server of the baseline completes when all sessions come at once.
    """

    seed: int
    per_s: float | None = None
    load: float | None = None

    def rate(self, capacity_per_s: float | None) -> float:
        """Sessions per second; the capacity is needed for a `load` only."""
        if self.per_s is not None:
            return self.per_s
        if self.load is None or capacity_per_s is None:
            raise ValueError("sessions arrive at a rate, or at a share of a capacity")
        return self.load * capacity_per_s


def arrives(session: Session) -> bool:
    """Whether it comes at a random moment: sessions of agents do, but for those that others begin."""
    return session.kind in AGENTS and not session.forked


def arriving(sessions: Sequence[Session], seed: int, per_s: float) -> list[Session]:
    """The same sessions with random moments of arrival (Poisson), each by itself, and the first ones as the lead."""
    rng, at_s, number = random.Random(f"arrivals {seed}"), 0.0, 0
    lead = round(LEAD_SHARE * sum(map(arrives, sessions)))
    arranged: list[Session] = []
    leading: set[str] = set()
    for session in sessions:
        if arrives(session):
            at_s += rng.expovariate(1.0) / per_s
            first, number = number < lead, number + 1
            if first:
                leading |= {session.name, *(name for turn in session.turns for name in turn.spawns)}
            arranged.append(replace(session, start_s=at_s, after=None, lead=first))
        else:
            arranged.append(replace(session, lead=session.name in leading))
    return arranged


def lead_s(sessions: Iterable[Session]) -> float:
    """When the first session arrives that counts."""
    return min((session.start_s for session in sessions if arrives(session) and not session.lead), default=0.0)


def all_at_once(sessions: Iterable[Session]) -> list[Session]:
    """The same sessions, each by itself and at the beginning: what they take is the server's capacity."""
    return [replace(session, start_s=0.0, after=None) if arrives(session) else session for session in sessions]


def capacity_per_s(sessions: Iterable[Session], records: Iterable[Record]) -> float | None:
    """How many sessions per second a server completes that has all of them at once; None where it completes none.

    Those count that arrive and are answered to their ends, with all that they spawned, and the time until the last of these is
    over: chats that go on after them do not make the server slower.

    Args:
        records: since the sessions began.
    """
    failed: set[str] = set()
    ended_us: dict[str, int] = {}
    for record in records:
        ended_us[record.session] = max(ended_us.get(record.session, 0), record.ended_us)
        if record.error is not None:
            failed.add(record.session)
    families = [
        {session.name, *(name for turn in session.turns for name in turn.spawns)}
        for session in sessions
        if arrives(session)
    ]
    whole = [family for family in families if family <= ended_us.keys() and family.isdisjoint(failed)]
    last_us = max((ended_us[name] for family in whole for name in family), default=0)
    return len(whole) / (last_us / 1e6) if last_us else None


def under_way(records: Iterable[Record]) -> tuple[float, float] | None:
    """How many sessions are under way on average, in the second and in the last quarter of the time in which they arrive. Single
    calls do not count.

    Args:
        records: of one arm in one round, the lead included.

    Returns:
        None for too few sessions.
    """
    spans: dict[str, tuple[int, int]] = {}
    for record in (one for one in records if one.kind != ONE_SHOT):
        begin, end = spans.get(record.session, (record.sent_us, record.ended_us))
        spans[record.session] = min(begin, record.sent_us), max(end, record.ended_us)
    last = max((begin for begin, _ in spans.values()), default=0)
    if len(spans) < ENOUGH_SESSIONS or not last:
        return None

    def mean(begin: float, end: float) -> float:
        return sum(max(min(b, end) - max(a, begin), 0.0) for a, b in spans.values()) / (end - begin)

    return mean(0.25 * last, 0.5 * last), mean(0.75 * last, last)


def grows(counts: Sequence[tuple[float, float]]) -> bool:
    """Whether the number of sessions under way grows to the end, in most rounds of an arm."""
    growing = sum(late > max(GROWTH * early, early + GROWTH_SESSIONS) for early, late in counts)
    return 2 * growing > len(counts)
