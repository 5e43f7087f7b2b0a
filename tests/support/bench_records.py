"""Hand-made records of requests, and rounds of sessions with noise of a known size."""

import numpy as np

from vllm_agentserve.bench.measure import RoundFigures, SessionFigures
from vllm_agentserve.bench.metrics import METRICS
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.sessions import Session, Turn

BY_KEY = {metric.key: metric for metric in METRICS}

FORKING = [
    Session("p", "p", (Turn((1,) * 8, 2, spawns=("p.1", "p.2")), Turn((2,) * 4, 1)), program="p"),
    Session("p.1", "p", (Turn((3,) * 4, 2), Turn((4,) * 4, 1)), forked=True, program="p"),
    Session("p.2", "p", (Turn((5,) * 4, 1),), forked=True, program="p"),
]
"""A session that spawns two others, one of which has two turns."""


def record(session: str = "a", turn: int = 0, sent: int = 0, stamps: tuple[int, ...] = (), **more) -> Record:
    """A request of agent `session`; times in ms."""
    fields = {
        "arm": "stock",
        "round": 0,
        "part": "measured",
        "session": session,
        "agent": session,
        "kind": "agent",
        "phase": "resume" if turn else "cold",
        "turn": turn,
        "prompt": "p",
        "prompt_tokens": 10,
        "wanted_tokens": len(stamps),
        "sent_us": sent * 1000,
        "ended_us": (stamps[-1] if stamps else sent) * 1000,
        "stamps_us": [stamp * 1000 for stamp in stamps],
    }
    return Record(**fields | more)


def noisy_rounds(rng: np.random.Generator, factor: float, rounds: int = 3, sessions: int = 8) -> list[RoundFigures]:
    """Rounds whose intervals vary within sessions, between sessions and between starts of the server."""
    made = []
    for number in range(rounds):
        start = rng.lognormal(0, 0.04)
        one = RoundFigures(number, 10.0 * start * factor)
        for index in range(sessions):
            own = rng.lognormal(0, 0.08) * start * factor
            gaps = 10 * own * rng.lognormal(0, 0.3, 200)
            name, parts = f"s{index}", (gaps, gaps[:90], gaps[:50], gaps[:1], gaps[1:5], gaps[5:9])
            one.sessions.append(SessionFigures(number, name, name, "agent", *parts, 200, 3.0 * own, 2.0 * own, 0))
        made.append(one)
    return made
