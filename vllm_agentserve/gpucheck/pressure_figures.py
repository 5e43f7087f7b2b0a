"""Figures of the part `pressure`: what agents under memory pressure take in each arm, and the ratio to stock vLLM's."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_agentserve.bench.measure import pool, quantile, round_figures
from vllm_agentserve.bench.records import Record
from vllm_agentserve.gpucheck.gaps import gaps_of

STOCK = "stock"
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """One row of the table: of one arm in one round.

    Args:
        ratio: whether the other arms are shown as ratios to stock vLLM.
    """

    label: str
    ratio: bool = True


ROWS = {
    "session_mean_s": Row("session, mean (s)"),
    "session_p95_s": Row("session, p95 (s)"),
    "makespan_s": Row("all sessions, from the first request to the last token (s)"),
    "tokens_per_s": Row("generated tokens per second"),
    "hit_percent": Row("context that resumed turns find in the KV cache (%)", ratio=False),
    "ttft_resume_ms": Row("TTFT of resumed turns, mean (ms)"),
    "ttft_cold_ms": Row("TTFT of first turns, mean (ms)"),
    "gap_p99_ms": Row("gap between two tokens, p99 (ms)"),
}
COUNTERS = {
    "load_held_requests": "first calls that load control held",
    "load_hold_seconds": "seconds these were held, together",
}
Figures = Mapping[str, float]


@dataclass
class CellRounds:
    """The rounds of one cell: figures and counters by round and arm, for the rounds that came to their end."""

    figures: dict[int, dict[str, Figures]] = field(default_factory=dict)
    counters: dict[int, dict[str, Mapping[str, float]]] = field(default_factory=dict)

    def rounds_of(self, arm: str) -> list[int]:
        return [number for number, arms in self.figures.items() if arm in arms]

    @property
    def arms(self) -> list[str]:
        """Those with a round."""
        return list(dict.fromkeys(name for arms in self.figures.values() for name in arms))


def hit_percent(records: Sequence[Record]) -> float:
    """Of the context that resumed turns have from the turn before, prompt and answer, the part that was in the KV cache."""
    by_turn = {(one.session, one.turn): one for one in records}
    found = wanted = 0
    for one in records:
        before = by_turn.get((one.session, one.turn - 1))
        if before is not None:
            found += one.cached_tokens or 0
            wanted += before.prompt_tokens + before.wanted_tokens
    return 100 * found / wanted if wanted else NAN


def figures_of(records: Sequence[Record], seconds: float) -> dict[str, float]:
    """The figures of one arm in one round, by the keys of `ROWS`."""
    one = round_figures(0, seconds, records, {})
    took = np.asarray([session.seconds for session in one.sessions])
    resumed, first = pool(one.sessions, "ttft_resume"), pool(one.sessions, "ttft_cold")
    return {
        "session_mean_s": float(took.mean()) if len(took) else NAN,
        "session_p95_s": quantile(took, 0.95),
        "makespan_s": seconds,
        "tokens_per_s": one.tokens_per_s,
        "hit_percent": hit_percent(records),
        "ttft_resume_ms": float(resumed.mean()) if len(resumed) else NAN,
        "ttft_cold_ms": float(first.mean()) if len(first) else NAN,
        "gap_p99_ms": quantile(gaps_of([records]).all, 0.99),
    }


def span(values: Sequence[float], write: Callable[[float], str]) -> str:
    """The mean of values, with the least and the largest if there are several."""
    if not values:
        return "-"
    shown = write(statistics.fmean(values))
    return f"{shown} [{write(min(values))}, {write(max(values))}]" if len(values) > 1 else shown


def plain(value: float) -> str:
    return f"{value:.4g}"


def ratios(cell: CellRounds, arm: str, key: str) -> list[float]:
    """Round by round, of stock vLLM's figure in the same round."""
    found = []
    for number in cell.rounds_of(arm):
        stock = cell.figures[number].get(STOCK, {}).get(key, NAN)
        if stock > 0:
            found.append(cell.figures[number][arm][key] / stock)
    return found


def cell_text(cell: CellRounds, arm: str, key: str) -> str:
    """Stock's figure, or the ratio to it: the mean of the rounds' ratios, with the least and the largest."""
    if arm != STOCK and ROWS[key].ratio and STOCK in cell.arms:
        return span(ratios(cell, arm, key), lambda value: f"x{value:.2f}")
    return span([cell.figures[number][arm][key] for number in cell.rounds_of(arm)], plain)


def table(cell: CellRounds) -> list[str]:
    """One cell as Markdown: arms beside each other, load control's counters below."""
    arms = cell.arms
    lines = ["| | " + " | ".join(arms) + " |", "|---|" + "---:|" * len(arms)]
    for key, row in ROWS.items():
        lines.append(f"| {row.label} | " + " | ".join(cell_text(cell, arm, key) for arm in arms) + " |")
    for key, label in COUNTERS.items():
        cells = []
        for arm in arms:
            known = [cell.counters[number][arm] for number in cell.rounds_of(arm)]
            cells.append(span([one[key] for one in known if key in one], plain))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append("| rounds | " + " | ".join(str(len(cell.rounds_of(arm))) for arm in arms) + " |")
    return lines
