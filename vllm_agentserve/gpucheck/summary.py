"""The pages of a check: `summary.md` for people, `summary.json` for machines."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_agentserve.gpucheck.check_run import PartResult


@dataclass(frozen=True)
class Done:
    """A part that was asked for: its name, title, what it found, how long that took, in seconds, and whether it was left out
    because too little time was left, and whether the results up to it could not be written."""

    name: str
    title: str
    finding: PartResult
    seconds: float
    left_out: bool = False
    unwritten: bool = False


def page(done: Sequence[Done], command: str) -> str:
    """The summary as Markdown: the verdicts first, then what each part has to show."""
    lines = ["# GPU check", "", f"`{command}`", "", "| part | verdict | | s |", "|---|---|---|---:|"]
    for one in done:
        lines.append(f"| {one.title} | **{one.finding.status}** | {one.finding.line} | {one.seconds:.0f} |")
    for one in done:
        if one.finding.page:
            lines += ["", f"## {one.title}", "", *one.finding.page]
    return "\n".join(lines) + "\n"


def figures(done: Sequence[Done], command: str) -> dict[str, Any]:
    """The same as data; NaN, which JSON does not know, becomes null."""
    parts = {one.name: asdict(one.finding) | {"seconds": round(one.seconds, 1)} for one in done}
    for part in parts.values():
        del part["page"]
    return {"command": command, "parts": without_nan(parts)}


def without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def write(folder: Path, done: Sequence[Done], command: str) -> None:
    """Writes both, each in one move; called after every part, so that a check that is ended leaves what it had.

    Raises:
        OSError: there is no room for them; the ones before stay.
    """
    texts = {"summary.md": page(done, command), "summary.json": json.dumps(figures(done, command), indent=1) + "\n"}
    for name, text in texts.items():
        partial = folder / f"{name}.part"
        partial.write_text(text)
        partial.replace(folder / name)
