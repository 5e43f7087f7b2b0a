"""The rows of the table: every figure of an arm, computed from its sessions or from its rounds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_agentserve.bench.measure import QUANTILES, RoundFigures, SessionFigures, pool, quantile
from vllm_agentserve.bench.program_figures import ProgramFigures
from vllm_agentserve.bench.sessions import CRITICAL, ONE_SHOT


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Args:
        of_sessions: computes it from sessions; or
        of_programs: from programs; or
        of_rounds: from whole rounds, for what no single session has.
        less_is_better: direction of improvement.
        samples: how many values the figure comes from; None where it is no quantile.
        needs: with fewer values than this it is not shown: it would be one of the two or three largest.
        judged: whether arms are compared in it; not in what only counts samples, or is the largest of them.
    """

    key: str
    label: str
    unit: str
    of_sessions: Callable[[Sequence[SessionFigures]], float] | None = None
    of_rounds: Callable[[Sequence[RoundFigures]], float] | None = None
    less_is_better: bool = True
    of_programs: Callable[[Sequence[ProgramFigures]], float] | None = None
    samples: Callable[[Sequence[RoundFigures]], int] | None = None
    needs: int = 0
    judged: bool = True

    def lacking(self, rounds: Sequence[RoundFigures]) -> int | None:
        """How many values there are, where these are too few for the figure; otherwise None."""
        count = self.samples(rounds) if self.samples is not None else self.needs
        return count if count < self.needs else None


BEYOND = 3
"""Values that have to lie beyond a quantile: of 300 values 3 lie beyond the p99, of 60 beyond the p95."""
STALL_MS = 100.0
"""Longer intervals between tokens are stalls: a reader notices them."""


def needed(q: float) -> int:
    """Values that a quantile needs; the median and the largest are what they are for any number."""
    return math.ceil(round(BEYOND / (1 - q), 6)) if 0.5 < q < 1 else 0


def pooled(name: str, q: float | None) -> Callable[[Sequence[SessionFigures]], float]:
    """A quantile (None: the mean) over the values called `name` of all sessions; batch sessions do not count."""

    def figure(sessions: Sequence[SessionFigures]) -> float:
        joined = pool(sessions, name)
        if q is None:
            return float(joined.mean()) if len(joined) else float("nan")
        return quantile(joined, q)

    return figure


def mean_of(
    value: Callable[[SessionFigures], float | None], *kinds: str
) -> Callable[[Sequence[SessionFigures]], float]:
    """The mean over sessions of these kinds; without any, over all but batch sessions and single calls."""

    def figure(sessions: Sequence[SessionFigures]) -> float:
        counted = [one for one in sessions if (one.kind in kinds if kinds else one.kind not in ("batch", ONE_SHOT))]
        values = [value(session) for session in counted if session.complete]
        known = [one for one in values if one is not None]
        return float(np.mean(known)) if known else float("nan")

    return figure


def per_token(q: float | None) -> Callable[[Sequence[ProgramFigures]], float]:
    """A quantile (None: the mean) of the completion times per token of all completed programs."""

    def figure(programs: Sequence[ProgramFigures]) -> float:
        times = np.asarray([ms for program in programs if (ms := program.per_token_ms) is not None])
        if q is None:
            return float(times.mean()) if len(times) else float("nan")
        return quantile(times, q)

    return figure


def longest(programs: Sequence[ProgramFigures]) -> float:
    return max(
        (program.seconds for program in programs if not program.failed and program.complete), default=float("nan")
    )


def mean_round(value: Callable[[RoundFigures], float]) -> Callable[[Sequence[RoundFigures]], float]:
    return lambda rounds: float(np.mean([value(one) for one in rounds]))


def gpu_metric(key: str) -> Callable[[Sequence[RoundFigures]], float]:
    return mean_round(lambda one: one.gpu.get(key, float("nan")))


def percent_attained(sessions: Sequence[SessionFigures]) -> float:
    """Sessions that ended by an error did not meet their thresholds, so all count."""
    known = [session.attained for session in sessions if session.kind != "batch" and session.attained is not None]
    return 100.0 * float(np.mean(known)) if known else float("nan")


def stalled(sessions: Sequence[SessionFigures]) -> float:
    """Seconds that streams stood still beyond `STALL_MS` in one interval, for every 1000 generated tokens."""
    beyond_ms = np.maximum(pool(sessions, "gaps") - STALL_MS, 0.0).sum()
    tokens = sum(session.tokens for session in sessions if session.kind != "batch" and session.complete)
    return float(beyond_ms) / tokens if tokens else float("nan")


def count_of(name: str) -> Callable[[Sequence[RoundFigures]], int]:
    """How many values called `name` there are."""
    return lambda rounds: len(pool([session for one in rounds for session in one.sessions], name))


def programs_completed(rounds: Sequence[RoundFigures]) -> int:
    return sum(program.per_token_ms is not None for one in rounds for program in one.programs)


def quantile_of(key: str, label: str, attribute: str, q: float) -> Metric:
    """A quantile over values of all sessions, in ms."""
    return Metric(
        key,
        label,
        "ms",
        pooled(attribute, q),
        samples=count_of(attribute),
        needs=needed(q),
        judged=q < 1,
    )


def number_of(key: str, label: str, attribute: str) -> Metric:
    return Metric(key, label, "", lambda sessions: float(len(pool(sessions, attribute))) or float("nan"), judged=False)


INTERVALS = {
    "itl": ("ITL", "gaps"),
    "itl_prefill": ("ITL while somebody prefills", "gaps_prefill"),
    "itl_cold": ("ITL while a cold prompt is read", "gaps_cold"),
}
METRICS = (
    *(
        metric
        for key, (words, attribute) in INTERVALS.items()
        for metric in (
            number_of(f"{key}_n", f"{words}, number of intervals", attribute),
            *(quantile_of(f"{key}_{name}_ms", f"{words}, {name}", attribute, q) for name, q in QUANTILES.items()),
        )
    ),
    Metric("stalled_s", f"stalls: time beyond {STALL_MS:g} ms, per 1000 tokens", "s", stalled),
    number_of("ttft_cold_n", "TTFT of cold prompts, number", "ttft_cold"),
    Metric("ttft_cold_mean_ms", "TTFT of cold prompts, mean", "ms", pooled("ttft_cold", None)),
    quantile_of("ttft_cold_p95_ms", "TTFT of cold prompts, p95", "ttft_cold", 0.95),
    number_of("ttft_resume_n", "TTFT of resumed turns, number", "ttft_resume"),
    Metric("ttft_resume_mean_ms", "TTFT of resumed turns, mean", "ms", pooled("ttft_resume", None)),
    quantile_of("ttft_resume_p95_ms", "TTFT of resumed turns, p95", "ttft_resume", 0.95),
    Metric("ttft_mean_ms", "TTFT of all turns, mean", "ms", pooled("ttft", None)),
    quantile_of("ttft_p95_ms", "TTFT of all turns, p95", "ttft", 0.95),
    quantile_of("tpot_p50_ms", "TPOT per request, p50", "tpot", 0.5),
    quantile_of("tpot_p95_ms", "TPOT per request, p95", "tpot", 0.95),
    Metric("session_mean_s", "session from first request to last token, mean", "s", mean_of(lambda one: one.seconds)),
    Metric("waiting_mean_s", "of which waiting for the server, mean", "s", mean_of(lambda one: one.served_s)),
    Metric(
        "one_shot_mean_s", "single calls, until the last token, mean", "s", mean_of(lambda one: one.seconds, ONE_SHOT)
    ),
    Metric("critical_mean_s", "sessions of critical agents, mean", "s", mean_of(lambda one: one.seconds, CRITICAL)),
    Metric(
        "round_s",
        "from the first request to the end of the last session",
        "s",
        of_rounds=mean_round(lambda one: one.seconds),
    ),
    *(
        Metric(
            f"program_{name}_ms",
            f"program, time per generated token, {name}",
            "ms",
            of_programs=per_token(q),
            samples=programs_completed,
            needs=needed(q or 0.0),
        )
        for name, q in (("mean", None), ("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    ),
    Metric("program_longest_s", "program that took longest", "s", of_programs=longest),
    Metric(
        "programs_per_min",
        "programs completed per minute",
        "",
        of_rounds=mean_round(lambda one: one.programs_per_min),
        less_is_better=False,
    ),
    Metric("attained_percent", "sessions within their thresholds", "%", percent_attained, less_is_better=False),
    Metric(
        "goodput_per_min",
        "goodput: such sessions per minute",
        "",
        of_rounds=mean_round(lambda one: one.goodput),
        less_is_better=False,
    ),
    Metric(
        "tokens_per_s",
        "generated tokens per second",
        "",
        of_rounds=mean_round(lambda one: one.tokens_per_s),
        less_is_better=False,
    ),
    Metric(
        "hit_percent",
        "prompt tokens found in the prefix cache",
        "%",
        of_rounds=mean_round(lambda one: one.hit_percent),
        less_is_better=False,
    ),
    Metric(
        "fairness",
        "fairness between agents (Jain)",
        "",
        of_rounds=mean_round(lambda one: one.fairness),
        less_is_better=False,
    ),
    Metric("joules_per_token", "energy per generated token", "J", of_rounds=gpu_metric("joules_per_token")),
    Metric("watts", "GPU power, mean", "W", of_rounds=gpu_metric("watts")),
    Metric("sm_mhz", "SM clock, mean", "MHz", of_rounds=gpu_metric("sm_mhz"), less_is_better=False),
    Metric(
        "utilisation_percent",
        "GPU utilisation, mean",
        "%",
        of_rounds=gpu_metric("utilisation_percent"),
        less_is_better=False,
    ),
)
