"""Gaps between the tokens of streams: those without another request's prompt under way, those beside one; how many are long."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_agentserve.bench.measure import Values, overlaps, prefill_spans, quantile
from vllm_agentserve.bench.metrics import needed
from vllm_agentserve.bench.records import Record

LONG = 2.0
"""A gap of so many quiet steps is long: a prompt was computed between two tokens."""
SLOWED = 1.5
"""A gap of so many quiet steps is one in which the launch of a chunk, in slices, kept a decode step waiting."""


@dataclass
class Gaps:
    """In ms.

    Args:
        quiet: no request waited for its first token meanwhile.
        beside: another request did.
    """

    quiet: Values
    beside: Values

    @property
    def quiet_step(self) -> float:
        """Median of the quiet gaps; NaN without any."""
        return quantile(self.quiet, 0.5)

    @property
    def all(self) -> Values:
        return np.concatenate([self.quiet, self.beside])


def count(values: Values, step_ms: float, times: float = LONG) -> dict[str, Any]:
    """How many take more than `times` times `step_ms`, and of how many; None where there are none, or no such step is known."""
    known = math.isfinite(step_ms) and len(values) > 0
    return {"n": len(values), "count": int((values > times * step_ms).sum()) if known else None}


def gaps_of(rounds: Sequence[Sequence[Record]]) -> Gaps:
    """All gaps of an arm, from its records round by round."""
    quiet, beside = [np.empty(0)], [np.empty(0)]
    for records in rounds:
        spans = prefill_spans(records)
        for record in records:
            stamps = np.asarray(record.stamps_us, dtype=float)
            busy = overlaps(stamps[:-1], stamps[1:], spans)
            gaps = np.diff(stamps) / 1000
            quiet.append(gaps[~busy])
            beside.append(gaps[busy])
    return Gaps(np.concatenate(quiet), np.concatenate(beside))


def quantile_of(values: Values, q: float) -> dict[str, Any]:
    """A quantile with the number of values; None where these are too few for it."""
    return {"n": len(values), "ms": quantile(values, q) if len(values) and len(values) >= needed(q) else None}


def mean_of(values: Values) -> dict[str, Any]:
    """The mean with the number of values; None without any."""
    return {"n": len(values), "ms": float(values.mean()) if len(values) else None}


def figures(gaps: Gaps, stock: Gaps | None) -> dict[str, dict[str, Any]]:
    """Rows of the table; every one with its `n`.

    Args:
        stock: those of stock vLLM, None where it has not run.
    """
    rows: dict[str, dict[str, Any]] = {
        "quiet step: median gap while nobody's prompt is computed": quantile_of(gaps.quiet, 0.5)
    }
    for name, q in {"p50": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}.items():
        rows[f"gap beside a prompt, {name}"] = quantile_of(gaps.beside, q)
    theirs = stock.quiet_step if stock is not None else math.nan
    rows["gaps beside a prompt above twice its own quiet step"] = count(gaps.beside, gaps.quiet_step)
    rows["gaps beside a prompt above twice stock's quiet step"] = count(gaps.beside, theirs)
    rows["all gaps above twice its own quiet step"] = count(gaps.all, gaps.quiet_step)
    rows["all gaps above twice stock's quiet step"] = count(gaps.all, theirs)
    rows["all gaps above 1.5 times stock's quiet step"] = count(gaps.all, theirs, SLOWED)
    rows["all gaps, mean"] = mean_of(gaps.all)
    return rows


def cell(row: Mapping[str, Any]) -> str:
    """A row of `figures` as text: never a figure without its number of values."""
    if "count" in row:
        return "-" if row["count"] is None else f"{row['count']} of {row['n']}"
    return f"- (n {row['n']})" if row["ms"] is None else f"{row['ms']:.4g} ms (n {row['n']})"
