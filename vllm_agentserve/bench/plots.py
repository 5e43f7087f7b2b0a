"""The pictures of a report, as PNG files. Colours of Okabe and Ito, which colour-blind readers can tell apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from vllm_agentserve.bench.measure import RoundFigures, SessionFigures, pool, prefill_spans
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.sessions import ONE_SHOT
from vllm_agentserve.bench.summary import Analysis

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (8, 1.5, 1.5, 1.5)), (0, (1.5, 1)))
SHORTEST_MS = 1.0
"""Shorter intervals are drawn at this: tokens that came together, no user sees them apart."""
STYLE: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "axes.axisbelow": True,
}
PERCENTS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)


def draw_all(analysis: Analysis, folder: Path) -> dict[str, Path]:
    """Draws what the data allow and returns title -> file; needs at least one round of one arm."""
    arms = {name: rounds for name, rounds in analysis.figures.items() if rounds}
    if not arms:
        return {}
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(analysis.figures)}
    with plt.rc_context(STYLE):
        figures = {
            "itl_cdf": itl_cdf(arms, colours),
            "timeline": timeline(analysis, colours),
            "ttft": ttft(arms, colours),
            "throughput": throughput(arms, colours),
        }
        drawn = {}
        for name, figure in figures.items():
            if figure is None:
                continue
            drawn[name] = folder / f"{name}.png"
            figure.savefig(drawn[name], bbox_inches="tight", facecolor="white")
            plt.close(figure)
    return drawn


def itl_cdf(arms: dict[str, list[RoundFigures]], colours: dict[str, str]) -> Figure:
    """Percentiles of the intervals between tokens; the scale is stretched towards 100 %, where agents stutter."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    titles = {"gaps_prefill": "while somebody else prefills", "gaps": "all intervals"}
    for axis, (attribute, title) in zip(axes, titles.items(), strict=True):
        for index, (name, rounds) in enumerate(arms.items()):
            values = np.maximum(np.sort(pool(every(rounds), attribute)), SHORTEST_MS)
            if len(values):
                beyond = 1 - np.arange(len(values)) / len(values)
                axis.step(
                    values, -np.log10(beyond), where="post", color=colours[name], label=name,
                    linestyle=DASHES[index % len(DASHES)], linewidth=2,
                )  # fmt: skip
        axis.set_title(title)
        axis.set_xscale("log")
        axis.set_xlim(left=SHORTEST_MS)
        axis.set_xlabel("time between two tokens (ms)")
        plain_log(axis.xaxis)
    axes[0].set_yticks(
        [-np.log10(1 - percent / 100) for percent in PERCENTS], [f"{percent:g} %" for percent in PERCENTS]
    )
    axes[0].set_ylabel("share of intervals that are shorter")
    axes[0].set_ylim(bottom=0)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(arms), 3))
    return figure


def timeline(analysis: Analysis, colours: dict[str, str]) -> Figure | None:
    """Two arms, one above the other, in the same round: every interval between tokens, and when cold prompts were read."""
    names = two_arms(analysis)
    common = [{one.round for one in analysis.figures[name]} for name in names]
    shared = sorted(set.intersection(*common)) if common else []
    if not shared:
        return None
    polluted = {one.round for one in analysis.rounds if one.polluted and one.arm in names}
    number = next((one for one in shared if one not in polluted), shared[0])
    figure, axes = plt.subplots(
        len(names),
        1,
        figsize=(11, 2.7 * len(names) + 0.8),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, name in zip(axes[:, 0], names, strict=True):
        records = [one for one in analysis.requests if (one.arm, one.round, one.part) == (name, number, "measured")]
        draw_intervals(axis, records, colours[name])
        axis.set_title(name)
        axis.set_ylabel("time since the\ntoken before (ms)")
        plain_log(axis.yaxis)
    axes[-1, 0].set_xlabel(f"time in round {number + 1} (s)")
    axes[-1, 0].set_xlim(left=0)
    handles = [
        Patch(color="#999999", alpha=0.35, label="a cold prompt waits for its first token"),
        Line2D([], [], marker="o", color="#444444", markersize=4, linestyle="", label="one token of any agent"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def draw_intervals(axis: Axes, records: Sequence[Record], colour: str) -> None:
    for begin, end in prefill_spans(records, ["cold"]):
        axis.axvspan(begin / 1e6, end / 1e6, color="#999999", alpha=0.35, linewidth=0)
    times = [np.asarray(one.stamps_us) / 1e6 for one in records if one.kind != "batch" and len(one.stamps_us) > 1]
    if times:
        at = np.concatenate([one[1:] for one in times])
        gaps = np.concatenate([np.diff(one) for one in times]) * 1000
        axis.scatter(at, np.maximum(gaps, SHORTEST_MS), s=7, color=colour, alpha=0.6, linewidths=0, rasterized=True)
        long = gaps > 5 * np.median(gaps)
        axis.hlines(gaps[long], (at - gaps / 1000)[long], at[long], color=colour, linewidth=1.2, alpha=0.7)
    axis.set_yscale("log")
    axis.set_ylim(bottom=SHORTEST_MS * 0.9)


def ttft(arms: dict[str, list[RoundFigures]], colours: dict[str, str]) -> Figure:
    """Every time to the first token as a dot, by phase; a bar at the median."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.7 + 0.75 * max(len(arms), 2)), layout="constrained", sharey=True)
    rng = np.random.default_rng(0)
    for axis, (attribute, title) in zip(
        axes, (("ttft_cold", "cold prompts"), ("ttft_resume", "resumed turns")), strict=True
    ):
        for row, (name, rounds) in enumerate(arms.items()):
            values = pool(every(rounds), attribute)
            if not len(values):
                continue
            axis.scatter(
                values, row + rng.uniform(-0.22, 0.22, len(values)), s=14, color=colours[name], alpha=0.55, linewidths=0
            )
            middle = float(np.median(values))
            axis.vlines(middle, row - 0.36, row + 0.36, color="black", linewidth=2)
            axis.annotate(f"{middle:.0f}", (middle, row - 0.38), ha="center", va="bottom", fontsize=10)
        axis.set_title(f"{title}: time to first token (ms), median marked")
        axis.set_xscale("log")
        plain_log(axis.xaxis)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.grid(axis="y", visible=False)
    axes[0].set_ylim(len(arms) - 0.45, -0.6)
    return figure


def throughput(arms: dict[str, list[RoundFigures]], colours: dict[str, str]) -> Figure:
    """Tokens per second and session times: a bar for the mean over rounds, a dot for every round."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.9 + 0.6 * max(len(arms), 2)), layout="constrained", sharey=True)
    measures = (
        ("generated tokens per second", tokens_per_second),
        ("mean session, first request to last token (s)", session_seconds),
    )
    for axis, (title, measure) in zip(axes, measures, strict=True):
        for row, (name, rounds) in enumerate(arms.items()):
            values = [measure(one) for one in rounds]
            mean = float(np.mean(values))
            axis.barh(row, mean, color=colours[name], alpha=0.6, height=0.6)
            axis.scatter(values, [row] * len(values), color="black", s=16, zorder=3)
            axis.annotate(
                f" {mean:.3g}", (max(mean, *values), row), va="center", xytext=(4, 0), textcoords="offset points"
            )
        axis.set_title(title)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.14)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def tokens_per_second(one: RoundFigures) -> float:
    return one.tokens_per_s


def session_seconds(one: RoundFigures) -> float:
    return float(np.mean([session.seconds for session in one.sessions if session.kind not in ("batch", ONE_SHOT)]))


def two_arms(analysis: Analysis) -> list[str]:
    """The baseline and the last arm that is agentserve, or else the last one."""
    names = [name for name, rounds in analysis.figures.items() if rounds]
    ours = [name for name in names if name.startswith("agentserve")]
    return list(dict.fromkeys([names[0], (ours or names)[-1]]))


def every(rounds: Sequence[RoundFigures]) -> list[SessionFigures]:
    return [session for one in rounds for session in one.sessions]


def plain_log(axis: Any) -> None:
    """Numbers instead of powers of ten, at 1, 2 and 5 times each."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
