"""What a child process is to do, and what became of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DAY_S = 86_400.0
"""The limit of a task that has none."""
TAIL_LINES = 12


@dataclass(frozen=True)
class Task:
    """A function, called in a child process.

    Args:
        function: "package.module:function"; called with `options`.
        result: the file for what it returns, as JSON.
        limit_s: it writes the stacks of its threads to its log shortly before so many seconds have passed.
        options: JSON.
        log: the file that gets what it writes.
        environment: its variables.
    """

    function: str
    result: Path
    limit_s: float
    options: Any
    log: Path
    environment: Mapping[str, str]


class ChildError(RuntimeError):
    """A child process gave no result; the message says why, with the last lines it wrote."""


@dataclass(frozen=True)
class ChildResult:
    """A child process that ended: its result, or why there is none, with the last lines it wrote.

    Args:
        seconds: it took so long, once it was started.
        out_of_time: whether the time of the part or of the check ended it, which says nothing of what it did.
        hung: whether it took longer than its own limit.
    """

    result: Any
    error: str | None
    seconds: float
    out_of_time: bool = False
    hung: bool = False

    @property
    def status(self) -> Literal["ok", "failed", "ran out of time"]:
        """Of a part that needs its result."""
        return "ok" if self.error is None else "ran out of time" if self.out_of_time else "failed"


def result_of(task: Task, name: str, code: int | None, seconds: float, parts_time: bool = False) -> ChildResult:
    """What became of a task.

    Args:
        name: of the task, for the message.
        code: the exit code of its process, None where that was still running after `task.limit_s`.
        seconds: it took so long, once it was started.
        parts_time: whether its limit was what was left for it, and not its own: then it has not hung.
    """
    why = f"exit code {code}" if code else None
    if code is None:
        why = f"not done after {task.limit_s:.0f} s"
    elif why is None and not task.result.exists():
        why = "no result"
    if why is None:
        return ChildResult(json.loads(task.result.read_text()), None, seconds)
    out_of_time = code is None and parts_time
    return ChildResult(None, f"{name}: {why}\n{tail(task.log)}", seconds, out_of_time, code is None and not parts_time)


def tail(log: Path) -> str:
    """The last lines of a log; of a crash the first ones that tell of it, since hundreds of the C stack may follow. Nothing of a
    log that is not there."""
    if not log.exists():
        return ""
    lines = log.read_text(errors="replace").splitlines()
    crashes = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
    begin = crashes[-1] if crashes else max(len(lines) - TAIL_LINES, 0)
    return "\n".join(lines[begin : begin + TAIL_LINES])
