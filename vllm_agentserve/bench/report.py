"""What people read: a Markdown table to paste, and one HTML page with pictures, commands, versions and conditions."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_agentserve.bench.compare import FAILED, NOISE
from vllm_agentserve.bench.judge import UNCONFIRMED
from vllm_agentserve.bench.machine import in_words
from vllm_agentserve.bench.metrics import METRICS, Metric
from vllm_agentserve.bench.records import Results
from vllm_agentserve.bench.summary import Analysis, analyse

CAPTIONS = {
    "itl_cdf": "How many of the intervals between two tokens are shorter than a given time. The upper end of each line is what "
    "an agent's user feels as stutter.",
    "timeline": "Every interval between two tokens of every agent, in one round. Where an agent waits, its dot rises; a line "
    "shows for how long. Grey: somebody's cold prompt is waiting for its first token.",
    "ttft": "Every request's time to its first token.",
    "throughput": "Bars are means over rounds, dots are the rounds.",
}
SUMMARY, TABLE, PAGE = "summary.json", "table.md", "report.html"


def write_report(results: Results, clean: bool = False, baseline: str | None = None) -> Analysis:
    """Computes everything from the raw data and writes summary, table, pictures and page into the results folder."""
    from vllm_agentserve.bench.plots import draw_all

    analysis = analyse(results, clean, baseline)
    folder = results.folder
    (folder / SUMMARY).write_text(json.dumps(analysis.summary, indent=1) + "\n")
    (folder / TABLE).write_text(markdown(analysis) + "\n")
    pictures = draw_all(analysis, folder)
    (folder / PAGE).write_text(page(analysis, pictures))
    return analysis


def rows(analysis: Analysis, intervals: bool = True) -> list[tuple[Metric, list[str]]]:
    """The table's rows: for every metric that has a figure, a cell per arm; rows named before the run come first."""
    found = []
    primary = analysis.summary["primary"]
    for metric in sorted(METRICS, key=lambda metric: metric.key not in primary):
        values = [analysis.summary["arms"][name]["figures"][metric.key] for name in analysis.figures]
        if any(value is not None for value in values):
            found.append((metric, [cell(analysis, name, metric, intervals) for name in analysis.figures]))
    return found


def cell(analysis: Analysis, arm: str, metric: Metric, interval: bool = True) -> str:
    """A figure, and against the baseline its ratio, with the interval if wanted; inside the noise it says so."""
    own = analysis.summary["arms"][arm]
    value = own["figures"][metric.key]
    if value is None:
        few = own["too_few_samples"].get(metric.key)
        return "-" if not few else f"only {few} values"
    words = number(value) if metric.samples is not None or metric.judged else f"{value:.0f}"
    if not metric.judged:
        return words
    against = analysis.summary["comparisons"].get(arm, {}).get(metric.key)
    if against is None or against["ratio"] is None:
        return words
    ratio = f"x{against['ratio']:.2f}"
    if interval and against["low"] is not None:
        ratio += f" [{against['low']:.2f}, {against['high']:.2f}]"
    return f"{words} ({ratio}{doubts(against) if interval else short_doubts(against)})"


def short_doubts(against: Mapping[str, Any]) -> str:
    return f", {against['verdict']}" if against["verdict"] in (NOISE, UNCONFIRMED, FAILED) else ""


def doubts(against: Mapping[str, Any]) -> str:
    """What keeps a ratio from counting: the verdict, the smallest ratio that could have been seen, rounds that all agree."""
    words = short_doubts(against)
    if against["verdict"] not in (NOISE, UNCONFIRMED):
        return words
    if against["verdict"] == NOISE and against["limit"] is not None:
        words += f" within x{against['limit']:.2f}"
    side = next((side for side in ("below", "above") if against[side] == against["rounds"] >= 3), None)
    return words + (f", {side} 1 in {against['rounds']} of {against['rounds']} rounds" if side else "")


def row_label(metric: Metric) -> str:
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def legend(analysis: Analysis) -> str:
    """How to read the table."""
    primary = analysis.summary["primary"]
    labels = [metric.label for metric in METRICS if metric.key in primary]
    words = [f"In brackets: ratio to {analysis.baseline} with its 95 % interval."]
    words.append(
        f"The first rows were to decide and were named before the run: {'; '.join(labels)}. Of these, and of all others, "
        "at most one table in twenty of equal arms has a row that is called a difference."
        if labels
        else "No row was named before the run; at most one table in twenty of equal arms has a row that is called a difference."
    )
    words.append(
        "Noise: the interval holds 1. Unconfirmed: it does not, but among so many rows that may be chance. Within xN: with so "
        "many rounds any ratio between 1/N and N would have been called noise."
    )
    return " ".join(words)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def markdown(analysis: Analysis) -> str:
    """The table, with what it was measured on and what to know."""
    names = list(analysis.figures)
    lines = [
        f"{describe_workload(analysis.experiment)}; {analysis.experiment['rounds']} rounds; "
        f"{in_words(analysis.experiment['machine'])}; {analysis.experiment['date']}.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" + "|---:" * len(names) + "|",
    ]
    for metric, cells in rows(analysis):
        lines.append(f"| {row_label(metric)} | " + " | ".join(cells) + " |")
    lines += ["", legend(analysis), ""]
    return "\n".join([*lines, *(f"- {note}" for note in analysis.summary["notes"])])


def describe_workload(experiment: dict[str, Any]) -> str:
    """The workload in one line, scale included."""
    workload = experiment["workload"]
    settings = ", ".join(
        f"{key} {value}" for key, value in workload.items() if key not in ("name", "source", "summary")
    )
    return f"Workload `{workload['name']}` ({settings}, seed {experiment['seed']}, {experiment['answers']} answers)"


def page(analysis: Analysis, pictures: dict[str, Path]) -> str:
    """The self-contained HTML page."""
    environment = Environment(
        loader=PackageLoader("vllm_agentserve.bench", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    images = [(name, CAPTIONS[name], base64.b64encode(path.read_bytes()).decode()) for name, path in pictures.items()]
    names = list(analysis.figures)
    table = [
        (metric, [(text, verdict_of(analysis, name, metric)) for name, text in zip(names, cells, strict=True)])
        for metric, cells in rows(analysis)
    ]
    return environment.get_template("report.html.j2").render(
        experiment=analysis.experiment,
        workload=describe_workload(analysis.experiment),
        machine=in_words(analysis.experiment["machine"]),
        names=names,
        baseline=analysis.baseline,
        table=table,
        images=images,
        notes=analysis.summary["notes"],
        rounds=analysis.rounds,
        arms=analysis.summary["arms"],
        curve=analysis.summary["attained_percent_by_factor"],
        legend=legend(analysis),
        primary=analysis.summary["primary"],
        markdown=markdown(analysis),
    )


def verdict_of(analysis: Analysis, arm: str, metric: Metric) -> str:
    against = analysis.summary["comparisons"].get(arm, {}).get(metric.key)
    return "" if against is None else str(against["verdict"])
