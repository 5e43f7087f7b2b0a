"""Service-level objectives as AgentServe (arXiv 2603.10342) has them: a session against itself, run alone."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_agentserve.bench.measure import SessionFigures
from vllm_agentserve.bench.records import Record


@dataclass(frozen=True)
class Thresholds:
    """What one session takes when it is alone on the stock server, in ms: means over its requests, by phase and per token."""

    ttft: dict[str, float]
    tpot: float


def thresholds(alone: Iterable[Record]) -> dict[str, Thresholds]:
    """The thresholds of every session, before the factor, from the records of the isolated run."""
    by_session: dict[str, list[Record]] = {}
    for record in alone:
        if record.error is None:
            by_session.setdefault(record.session.removeprefix("alone-"), []).append(record)
    found = {}
    for name, records in by_session.items():
        ttft = {
            phase: float(np.mean([record.ttft_ms for record in records if record.phase == phase]))
            for phase in ("cold", "resume")
            if any(record.phase == phase for record in records)
        }
        tpot = [record.tpot_ms for record in records if record.tpot_ms is not None]
        found[name] = Thresholds(ttft, float(np.mean(tpot)) if tpot else float("nan"))
    return found


def attained(session: SessionFigures, limit: Thresholds, factor: float) -> bool:
    """Whether a session met both its TTFT and its TPOT threshold: isolated run x `factor` (AgentServe's definition).

    Means over the session's requests are compared; cold and resume turns each with their own.
    """
    if session.failed:
        return False
    for phase, values in (("cold", session.ttft_cold), ("resume", session.ttft_resume)):
        if len(values) and phase in limit.ttft and values.mean() > factor * limit.ttft[phase]:
            return False
    return not len(session.tpot) or not session.tpot.mean() > factor * limit.tpot
