"""Metrics of load control with one more label: why first calls began, why there is a limit or none, how long calls were held.

A report is one flat dictionary of numbers, and a counter in it carries what was added since the last report. The histogram is
two counters for each class and bucket: the calls in it, and the seconds these were held together. The API server observes the
mean of a bucket once for each of its calls. Its buckets, count and sum are then those of the engine, and several API servers
add up as with vLLM's own histograms.

The number of series is bounded: labels have the values of `BEGINS`, `REASONS`, `FOUND` and `CLASSES`.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from math import inf, nextafter
from typing import get_args

from vllm_agentserve.policy.claims import Begins
from vllm_agentserve.policy.hints import CLASSES
from vllm_agentserve.policy.load import LoadReport
from vllm_agentserve.policy.load_limit import Reason

BEGINS: tuple[str, ...] = get_args(Begins)
REASONS: tuple[str, ...] = get_args(Reason)
FOUND = ("cache", "host", "computed")
"""Where the context of a returning call was: in the KV cache, in host memory, or nowhere, so that it was computed again."""

BEGUN = "load_begun_requests"
RETURNING = "returning_context_tokens"
LIMIT_REASON = "load_limit_reason"
HOLD_TIME = "load_hold_time_seconds"

LOAD_COUNTERS = {
    BEGUN: ("reason", BEGINS, "First calls that load control let begin, by reason. With load_control only."),
    RETURNING: (
        "found",
        FOUND,
        "Tokens of the context of calls whose program had one, by where they were found. With load_control only.",
    ),
}
"""(label, its values, meaning) by name, without prefix and `_total`. The key in a report is `name:label value`."""
LOAD_GAUGES = {
    LIMIT_REASON: ("reason", "1 for why there is a limit or none (fits, faster without, model), 0 for the others."),
}
"""(label, meaning) by name, without prefix; keys as above."""
LOAD_HISTOGRAMS = {
    HOLD_TIME: ("class", CLASSES, "Time that first calls were held before they began. With load_control only."),
}
"""(label, its values, meaning) by name, without prefix."""
HOLD_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the histogram. Calls that were held for as long as `max_hold_s` allows by default are in the last one."""


@dataclass(frozen=True)
class Bucket:
    """One bucket of a histogram, for one class.

    Args:
        kind: the class.
        above_s: calls in it were held for longer.
        bound_s: and no longer than this.
        name: of the histogram.
    """

    kind: str
    above_s: float
    bound_s: float
    name: str = HOLD_TIME

    @property
    def calls(self) -> str:
        """The key of its calls in a report."""
        return f"{self.name}:{self.kind}:{self.bound_s:g}"

    @property
    def seconds(self) -> str:
        """The key of the seconds these were held together."""
        return f"{self.name}_sum:{self.kind}:{self.bound_s:g}"

    def mean_s(self, calls: float, seconds: float) -> float:
        """The mean of its calls, which rounding does not move into another bucket."""
        return min(max(seconds / calls, nextafter(self.above_s, inf)), self.bound_s)


BUCKETS = {
    kind: [
        Bucket(kind, above_s, bound_s)
        for above_s, bound_s in zip((-inf, *HOLD_BOUNDS_S), (*HOLD_BOUNDS_S, inf), strict=True)
    ]
    for kind in CLASSES
}
HOLD_KEYS = frozenset(key for buckets in BUCKETS.values() for one in buckets for key in (one.calls, one.seconds))
"""All keys of the histogram in a report."""


def count_hold(counts: MutableMapping[str, float], batch: bool, seconds: float) -> None:
    """Adds a call that was held for so long to the counters of the histogram."""
    bucket = BUCKETS[CLASSES[batch]][bisect_left(HOLD_BOUNDS_S, seconds)]
    counts[bucket.calls] = counts.get(bucket.calls, 0) + 1
    counts[bucket.seconds] = counts.get(bucket.seconds, 0.0) + seconds


def count_returning(counts: MutableMapping[str, float], context: int, cached: int, host_from: int | None) -> None:
    """Adds a call of a program that had a context.

    Args:
        context: its tokens, as far as they are part of the prompt.
        cached: tokens of the prompt that were found.
        host_from: how many of them were in the KV cache, the others in host memory; None where all were.
    """
    there = min(cached, context)
    in_cache = there if host_from is None else min(host_from, there)
    for found, tokens in zip(FOUND, (in_cache, there - in_cache, context - there), strict=True):
        counts[f"{RETURNING}:{found}"] = counts.get(f"{RETURNING}:{found}", 0) + tokens


def hold_times(report: Mapping[str, float]) -> Iterator[tuple[str, float, int]]:
    """What the histogram is to observe for a report: (class, seconds, how often)."""
    if HOLD_KEYS.isdisjoint(report):
        return
    for kind, buckets in BUCKETS.items():
        for bucket in buckets:
            calls = report.get(bucket.calls)
            if calls:
                yield kind, bucket.mean_s(calls, report.get(bucket.seconds, 0.0)), round(calls)


def load_report(report: LoadReport, counts: MutableMapping[str, float]) -> dict[str, float]:
    """The gauges of load control; brings the counters of first calls that began up to date."""
    for why, calls in report.begun.items():
        counts[f"{BEGUN}:{why}"] = calls
    gauges = {
        "load_held": float(report.held),
        "load_limit_tokens": report.limit_tokens or 0.0,
        "load_claims_tokens": report.claims_tokens,
        "load_pool_tokens": float(report.pool_tokens),
        "load_room_ratio": report.room,
        "load_programs": report.programs,
        "load_hit_ratio": report.hit_ratio,
    }
    return gauges | {f"{LIMIT_REASON}:{reason}": float(reason == report.reason) for reason in REASONS}
