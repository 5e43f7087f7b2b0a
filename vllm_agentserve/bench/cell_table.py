"""The main figures of several results folders beside each other: one column for each kind of traffic and arm."""

from collections.abc import Sequence
from pathlib import Path

from vllm_agentserve.bench.metrics import METRICS
from vllm_agentserve.bench.records import Results
from vllm_agentserve.bench.report import cell, row_label
from vllm_agentserve.bench.summary import analyse, pressure_note

MAIN = (
    "session_mean_s",
    "one_shot_mean_s",
    "critical_mean_s",
    "round_s",
    "ttft_resume_mean_ms",
    "tokens_per_s",
    "hit_percent",
    "itl_prefill_p99_ms",
    "itl_p50_ms",
    "itl_p95_ms",
    "itl_p99_ms",
    "stalled_s",
)
"""Keys of the rows, in their order."""


def folders_under(folders: Sequence[Path]) -> list[Path]:
    """The results folders among `folders` and in them, however deep."""
    return [found.parent for folder in folders for found in sorted(folder.rglob(Results.EXPERIMENT))]


def cell_tables(folders: Sequence[Path]) -> str:
    """One Markdown table for each parent folder."""
    by_parent: dict[Path, list[Path]] = {}
    for folder in folders:
        by_parent.setdefault(folder.parent, []).append(folder)
    return "\n\n".join(cell_table(own) for own in by_parent.values())


def cell_table(folders: Sequence[Path]) -> str:
    found = [(folder, analyse(Results(folder))) for folder in folders]
    columns = [(folder, analysis, arm) for folder, analysis in found for arm in analysis.figures]
    metrics = [metric for key in MAIN for metric in METRICS if metric.key == key]
    lines = [
        f"{folders[0].parent}: {found[0][1].experiment['rounds']} rounds.",
        "",
        "| | " + " | ".join(f"{folder.name}: {arm}" for folder, _, arm in columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for metric in metrics:
        lines.append(f"| {row_label(metric)} | " + " | ".join(cell(one, arm, metric) for _, one, arm in columns) + " |")
    lines += ["", "In brackets: ratio to the first arm of the same folder, with its 95 % interval.", ""]
    for folder, analysis in found:
        lines += [f"- {folder.name}: {note}" for note in pressure_note(analysis.experiment, analysis.rounds)]
    return "\n".join(lines)
