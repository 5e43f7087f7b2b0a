"""From streams to figures: intervals between tokens, quiet and while somebody prefills, and times to the first token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_agentserve.bench.client import Stream

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and max by nearest rank; NaN where there are no values."""
    if not values:
        return dict.fromkeys(QUANTILES, float("nan"))
    return {name: float(np.quantile(values, q, method="inverted_cdf")) for name, q in QUANTILES.items()}


@dataclass(frozen=True)
class Gaps:
    """Intervals between tokens of a stream, in ms, by what the engine did meanwhile."""

    during: list[float]
    """Some other request waited for its first token during the interval."""
    quiet: list[float]
    """Nobody did."""


def split_gaps(streams: Iterable[Stream], prefills: Iterable[tuple[Stream, float, float]]) -> Gaps:
    """Splits the intervals of `streams` by whether another request was in its prefill.

    Args:
        prefills: (stream, begin, end) of the time every request waited for its first token.
    """
    spans = sorted(((begin, end, id(owner)) for owner, begin, end in prefills), key=lambda span: span[0])
    gaps = Gaps([], [])
    for stream in streams:
        for begin, end in stream.gaps():
            busy = any(first < end and last > begin and owner != id(stream) for first, last, owner in spans)
            (gaps.during if busy else gaps.quiet).append((end - begin) * 1000)
    return gaps
