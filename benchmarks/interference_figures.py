"""The figures of the interference benchmark: from raw intervals to a table of arms, and every arm against stock."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_agentserve.bench.measure import QUANTILES, quantiles
from vllm_agentserve.bench.metrics import needed
from vllm_agentserve.bench.summary import DECISIONS
from vllm_agentserve.config import SERIES

ELSEWHERE = ("step_no_decodes", "step_ineligible")
"""Decisions that are none between lane and steps: nobody decoded, or the lane could not."""


@dataclass
class Run:
    """What one arm of one round gave: raw intervals in ms, times to the first token in s."""

    during_ms: list[float] = field(default_factory=list)
    first_during_ms: list[float] = field(default_factory=list)
    quiet_ms: list[float] = field(default_factory=list)
    cold_ttft_s: list[tuple[int, float]] = field(default_factory=list)
    alone_ttft_s: list[tuple[int, float]] = field(default_factory=list)
    resume_ttft_s: list[float] = field(default_factory=list)
    """Of short turns that met a cold prompt."""
    decode_tokens: int = 0
    decode_s: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)
    """Counters of agentserve at the end: what it decided, and why."""


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """One arm over all rounds: quantiles of the intervals of all rounds together, with their number, and medians over rounds
    of the rest. A quantile of too few values is None: it would be one of the two or three largest."""

    def over_rounds(values: Iterable[float]) -> float:
        return round(statistics.median(values), 3)

    def mean_ttft(pairs: list[tuple[int, float]]) -> float:
        return statistics.fmean(seconds for _, seconds in pairs)

    def together(intervals: Iterable[list[float]]) -> dict[str, Any]:
        values = list(itertools.chain(*intervals))
        shown = {
            name: round(q, 2) if len(values) >= needed(QUANTILES[name]) else None
            for name, q in quantiles(values).items()
        }
        return {"n": len(values)} | shown

    resumed = [seconds * 1000 for run in runs for seconds in run.resume_ttft_s]
    return {
        "resume_ttft_during_ms": {"turns": len(resumed), **together([resumed])} if resumed else {},
        "itl_during_ms": together(run.during_ms for run in runs),
        "itl_during_max_ms_each_round": [round(quantiles(run.during_ms)["max"], 1) for run in runs],
        "itl_first_cold_ms": together(run.first_during_ms for run in runs),
        "itl_quiet_p50_ms": over_rounds(quantiles(run.quiet_ms)["p50"] for run in runs),
        "itl_quiet_p99_ms": over_rounds(quantiles(run.quiet_ms)["p99"] for run in runs),
        "cold_ttft_mean_s": over_rounds(mean_ttft(run.cold_ttft_s) for run in runs),
        "alone_ttft_mean_s": over_rounds(mean_ttft(run.alone_ttft_s) for run in runs),
        "decode_tokens_per_s": over_rounds(run.decode_tokens / run.decode_s for run in runs),
        "long_prompts": decisions(runs),
    }


def decisions(runs: Sequence[Run]) -> dict[str, float]:
    """How many long prompts of all rounds went to the lane and to steps, by reason."""
    names = [f"{key}_requests" for key in DECISIONS if key not in ELSEWHERE]
    total = {name: sum(run.counts.get(f"{SERIES}{name}", 0.0) for run in runs) for name in names}
    return {name: count for name, count in total.items() if count}


def alone_summary(runs: Sequence[Run]) -> dict[str, Any]:
    """One arm of `--path alone`: the median over rounds of the mean over prompts."""
    means = [statistics.fmean(seconds for _, seconds in run.alone_ttft_s) for run in runs]
    return {"alone_ttft_mean_s": round(statistics.median(means), 3)}


def ratios(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Every arm against stock."""
    stock = arms["stock"]
    return {
        name: {
            **{
                f"itl_during_{q}_stock_over_arm": round(stock["itl_during_ms"][q] / arm["itl_during_ms"][q], 2)
                for q in ("p99", "max")
                if stock["itl_during_ms"][q] and arm["itl_during_ms"][q]
            },
            "cold_ttft_arm_over_stock": round(arm["cold_ttft_mean_s"] / stock["cold_ttft_mean_s"], 3),
            "alone_ttft_arm_over_stock": round(arm["alone_ttft_mean_s"] / stock["alone_ttft_mean_s"], 3),
            **resumed_ratio(stock, arm),
            "quiet_itl_p50_arm_over_stock": round(arm["itl_quiet_p50_ms"] / stock["itl_quiet_p50_ms"], 3),
            "decode_tokens_arm_over_stock": round(arm["decode_tokens_per_s"] / stock["decode_tokens_per_s"], 3),
        }
        for name, arm in arms.items()
        if name != "stock"
    }


def resumed_ratio(stock: dict[str, Any], arm: dict[str, Any]) -> dict[str, float]:
    """Times to the first token of short turns beside a cold prompt, where they were measured."""
    theirs, ours = stock.get("resume_ttft_during_ms"), arm.get("resume_ttft_during_ms")
    if not theirs or not ours:
        return {}
    return {
        f"resume_ttft_{q}_arm_over_stock": round(ours[q] / theirs[q], 3)
        for q in ("p50", "p95")
        if ours[q] and theirs[q]
    }


def table(arms: dict[str, dict[str, Any]]) -> str:
    """The arms as a Markdown table."""
    lines = [
        "| arm | ITL during prefill, n | p50 | p95 | p99 | max | first cold max | quiet p50 | quiet p99 | cold TTFT s "
        "| alone TTFT s | decode tok/s |",
        "|---" * 12 + "|",
    ]
    for name, arm in arms.items():
        during = arm["itl_during_ms"]
        figures = [
            *(during[key] for key in ("p50", "p95", "p99", "max")),
            arm["itl_first_cold_ms"]["max"],
            *(arm[key] for key in ("itl_quiet_p50_ms", "itl_quiet_p99_ms")),
        ]
        seconds = [f"{arm[key]:.3f}" for key in ("cold_ttft_mean_s", "alone_ttft_mean_s")]
        shown = ["-" if figure is None else f"{figure:.1f}" for figure in figures]
        cells = [name, str(during["n"]), *shown, *seconds, f"{arm['decode_tokens_per_s']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """The same data with floats to the microsecond, for smaller files."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
