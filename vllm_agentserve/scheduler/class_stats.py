"""Metrics by class of calls (`agent_class`): how long they waited, when their first token came, whether deadlines were met.

Histograms travel as those of load control do, see `load_stats.py`. The number of series is bounded: `class` has the values of
`CLASSES`, and a call without a class is interactive.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, MutableMapping
from math import inf

from vllm_agentserve.policy.hints import CLASSES
from vllm_agentserve.scheduler.load_stats import Bucket

WAIT = "class_wait_seconds"
FIRST_TOKEN = "class_first_token_seconds"
MET, MISSED = "class_deadline_met_requests", "class_deadline_missed_requests"

CLASS_HISTOGRAMS = {
    WAIT: (
        "class",
        CLASSES,
        "Time from the arrival of a request to its admission. Time held by load control is part of it.",
    ),
    FIRST_TOKEN: ("class", CLASSES, "Time from the arrival of a request in the engine to its first token."),
}
"""(label, its values, meaning) by name, without prefix."""
CLASS_COUNTERS = {
    MET: ("class", CLASSES, "Requests with agent_deadline_ms that ended in time."),
    MISSED: (
        "class",
        CLASSES,
        "Requests with agent_deadline_ms that ended later, or were given up or failed after it.",
    ),
}
"""(label, its values, meaning) by name, without prefix and `_total`. The key in a report is `name:label value`."""
CLASS_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the histograms."""
BUCKETS = {
    name: {
        kind: [
            Bucket(kind, above_s, bound_s, name)
            for above_s, bound_s in zip((-inf, *CLASS_BOUNDS_S), (*CLASS_BOUNDS_S, inf), strict=True)
        ]
        for kind in CLASSES
    }
    for name in CLASS_HISTOGRAMS
}
CLASS_KEYS = frozenset(
    key
    for kinds in BUCKETS.values()
    for buckets in kinds.values()
    for one in buckets
    for key in (one.calls, one.seconds)
)
"""All keys of the histograms in a report."""


def count_time(counts: MutableMapping[str, float], name: str, batch: bool, seconds: float) -> None:
    """Adds a call to a histogram."""
    bucket = BUCKETS[name][CLASSES[batch]][bisect_left(CLASS_BOUNDS_S, seconds)]
    counts[bucket.calls] = counts.get(bucket.calls, 0) + 1
    counts[bucket.seconds] = counts.get(bucket.seconds, 0.0) + seconds


def count_deadline(counts: MutableMapping[str, float], batch: bool, met: bool) -> None:
    key = f"{MET if met else MISSED}:{CLASSES[batch]}"
    counts[key] = counts.get(key, 0) + 1


def class_times(report: Mapping[str, float]) -> Iterator[tuple[str, str, float, int]]:
    """What the histograms are to observe for a report: (name, class, seconds, how often)."""
    if CLASS_KEYS.isdisjoint(report):
        return
    for name, kinds in BUCKETS.items():
        for kind, buckets in kinds.items():
            for bucket in buckets:
                calls = report.get(bucket.calls)
                if calls:
                    yield name, kind, bucket.mean_s(calls, report.get(bucket.seconds, 0.0)), round(calls)
