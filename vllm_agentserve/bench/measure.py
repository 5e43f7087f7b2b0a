"""From records to figures: intervals between tokens, times to the first token, sessions against their thresholds.

Everything is computed from what was written to the results folder, so that anybody can compute it again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm_agentserve.bench.program_figures import ProgramFigures, program_figures
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.sessions import AGENTS

if TYPE_CHECKING:
    from vllm_agentserve.bench.client import Stream

Values = NDArray[np.float64]
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def quantile(values: Values, q: float) -> float:
    """Nearest rank; NaN where there are no values."""
    return float(np.quantile(values, q, method="inverted_cdf")) if len(values) else float("nan")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and max by nearest rank; NaN where there are no values."""
    return {name: quantile(np.asarray(values), q) for name, q in QUANTILES.items()}


@dataclass(frozen=True)
class SplitGaps:
    """Intervals between tokens of a stream, in ms, by what the engine did meanwhile."""

    during: list[float]
    """Some other request waited for its first token during the interval."""
    quiet: list[float]
    """Nobody did."""


def split_gaps(streams: "Iterable[Stream]", prefills: Iterable[tuple[float, float]]) -> SplitGaps:
    """Splits the intervals of `streams` by whether a prompt was read, given the (begin, end) of each prefill."""
    spans = merged(np.asarray(list(prefills), dtype=float).reshape(-1, 2))
    gaps = SplitGaps([], [])
    for stream in streams:
        stamps = np.asarray(stream.stamps)
        busy = overlaps(stamps[:-1], stamps[1:], spans)
        intervals = np.diff(stamps) * 1000
        gaps.during.extend(intervals[busy].tolist())
        gaps.quiet.extend(intervals[~busy].tolist())
    return gaps


def merged(spans: Values) -> Values:
    """Sorted spans without overlaps; `spans` and the result have shape (n, 2)."""
    if not len(spans):
        return spans
    joined: list[list[float]] = []
    for begin, end in spans[np.argsort(spans[:, 0])]:
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return np.asarray(joined)


def overlaps(begins: Values, ends: Values, spans: Values) -> NDArray[np.bool_]:
    """Which of the intervals (begins[i], ends[i]) share time with one of the merged `spans`."""
    if not len(spans):
        return np.zeros(len(begins), dtype=bool)
    following = np.searchsorted(spans[:, 1], begins, side="right")
    inside = np.minimum(following, len(spans) - 1)
    return (following < len(spans)) & (spans[inside, 0] < ends)


@dataclass(frozen=True)
class SessionFigures:
    """One session of one round: the unit that is resampled, since its requests depend on each other. Times in ms."""

    round: int
    name: str
    agent: str
    kind: str
    gaps: Values
    gaps_prefill: Values
    """Intervals in which another request waited for its first token."""
    gaps_cold: Values
    """Of these, the ones in which that request was a cold prompt."""
    ttft_cold: Values
    ttft_resume: Values
    tpot: Values
    tokens: int
    seconds: float
    """From the first request to the last token, tools included."""
    served_s: float
    """Of these, the time spent waiting for the server."""
    failed: int
    attained: bool | None = None
    """Whether it met both its thresholds; None without thresholds."""
    complete: bool = True
    """Whether it ended without an error in all arms; if not, no latency of it counts in any arm."""

    @property
    def ttft(self) -> Values:
        """Of all turns."""
        return np.concatenate([self.ttft_cold, self.ttft_resume])


def pool(sessions: Iterable[SessionFigures], name: str) -> Values:
    """The values called `name` of all sessions, one after the other; batch sessions and incomplete ones do not count."""
    values = [getattr(session, name) for session in sessions if session.kind != "batch" and session.complete]
    return np.concatenate(values) if values else np.empty(0)


@dataclass(frozen=True)
class RoundFigures:
    """One arm in one round."""

    round: int
    seconds: float
    sessions: list[SessionFigures] = field(default_factory=list)
    gpu: Mapping[str, float] = field(default_factory=dict)
    programs: list[ProgramFigures] = field(default_factory=list)
    """Empty where the workload does not consist of programs."""
    server: Mapping[str, float] = field(default_factory=dict)
    """What the server's counters gained."""

    @property
    def tokens_per_s(self) -> float:
        return sum(session.tokens for session in self.sessions) / self.seconds

    @property
    def programs_per_min(self) -> float:
        """Programs completed per minute; NaN where there are none at all."""
        if not self.programs:
            return float("nan")
        return 60 * sum(not program.failed for program in self.programs) / self.seconds

    @property
    def hit_percent(self) -> float:
        """Share of prompt tokens that vLLM found in its prefix cache, or in host memory behind it; NaN where the server does not
        count them."""
        asked = self.server.get("vllm:prefix_cache_queries", 0.0)
        found = self.server.get("vllm:prefix_cache_hits", 0.0) + self.server.get("vllm:external_prefix_cache_hits", 0.0)
        return 100 * found / asked if asked else float("nan")

    @property
    def goodput(self) -> float:
        """Sessions per minute that met their thresholds; NaN where there are none."""
        if all(session.attained is None for session in self.sessions):
            return float("nan")
        return 60 * sum(bool(session.attained) for session in self.sessions) / self.seconds

    @property
    def fairness(self) -> float:
        """Jain's index over agents of tokens per second of waiting for the server: 1 when all are served alike."""
        tokens: dict[str, float] = {}
        served: dict[str, float] = {}
        for session in self.sessions:
            if session.kind in AGENTS:
                tokens[session.agent] = tokens.get(session.agent, 0.0) + session.tokens
                served[session.agent] = served.get(session.agent, 0.0) + session.served_s
        rates = np.asarray([tokens[agent] / served[agent] for agent in tokens if served[agent] > 0])
        return float(rates.sum() ** 2 / (len(rates) * (rates**2).sum())) if rates.any() else float("nan")


def prefill_spans(records: Iterable[Record], phases: Sequence[str] = ("cold", "resume")) -> Values:
    """(begin, end) in microseconds of the time requests in these phases waited for their first token, without overlaps."""
    spans = [(record.sent_us, record.stamps_us[0]) for record in records if record.phase in phases and record.stamps_us]
    return merged(np.asarray(spans, dtype=float).reshape(-1, 2))


def round_figures(
    number: int,
    seconds: float,
    records: Sequence[Record],
    gpu: Mapping[str, float],
    server: Mapping[str, float] | None = None,
    beside: Sequence[Record] = (),
) -> RoundFigures:
    """The figures of one arm in one round from the records of its measured part.

    A session's own prefills never overlap its own intervals, so all prefills are joined once for everybody.

    Args:
        beside: records of requests that are in no figure, but whose prompts were computed meanwhile.
    """
    any_spans, cold_spans = prefill_spans([*records, *beside]), prefill_spans([*records, *beside], ["cold"])
    by_session: dict[str, list[Record]] = {}
    for record in records:
        by_session.setdefault(record.session, []).append(record)
    sessions: list[SessionFigures] = []
    for name, own in by_session.items():
        own.sort(key=lambda record: record.turn)
        good = [record for record in own if record.error is None]
        stamps = [np.asarray(record.stamps_us, dtype=float) for record in own]
        intervals = [np.diff(times) / 1000 for times in stamps]

        def within(spans: Values, stamps: Sequence[Values] = stamps, intervals: Sequence[Values] = intervals) -> Values:
            flags = [overlaps(times[:-1], times[1:], spans) for times in stamps]
            return np.concatenate([gap[busy] for gap, busy in zip(intervals, flags, strict=True)])

        sessions.append(
            SessionFigures(
                round=number,
                name=name,
                agent=own[0].agent,
                kind=own[0].kind,
                gaps=np.concatenate(intervals),
                gaps_prefill=within(any_spans),
                gaps_cold=within(cold_spans),
                ttft_cold=np.asarray([record.ttft_ms for record in good if record.phase == "cold"]),
                ttft_resume=np.asarray([record.ttft_ms for record in good if record.phase == "resume"]),
                tpot=np.asarray([record.tpot_ms for record in good if record.tpot_ms is not None]),
                tokens=sum(len(record.stamps_us) for record in own),
                seconds=(max(record.ended_us for record in own) - min(record.sent_us for record in own)) / 1e6,
                served_s=sum(record.ended_us - record.sent_us for record in own) / 1e6,
                failed=sum(record.error is not None for record in own),
            )
        )
    return RoundFigures(number, seconds, sessions, gpu, program_figures(number, records), server or {})
