"""Where a check runs and what it may take: the folder, the device, the clock, and child processes with a time limit."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vllm_agentserve.gpucheck.archive import write_archive
from vllm_agentserve.processes.child import STACK_BEFORE_END_S
from vllm_agentserve.processes.starter import Starter, end_group
from vllm_agentserve.processes.task import DAY_S, ChildResult, Task, result_of
from vllm_agentserve.vllm_compat.cuda import QUEUES, QUEUES_VARIABLE

PACKAGE = "vllm_agentserve.gpucheck"

Status = Literal["ok", "failed", "ran out of time", "not run"]


@dataclass(frozen=True)
class PartResult:
    """What a part found.

    Args:
        status: "failed" when something is wrong or hangs, "ran out of time" when the clock ended it before it could tell,
            "not run" when it does not apply here or was not begun.
        line: the verdict, one sentence.
        page: Markdown lines for the summary.
        figures: the same for machines, JSON.
    """

    status: Status
    line: str
    page: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def with_crashes(finding: PartResult, crashes: Sequence[str]) -> PartResult:
    """The result with the crashes of this part in its line. Its status stays: the fork itself may crash a library, and the new
    interpreter, which is what users have, did the task. But memory that is overwritten also crashes only now and then."""
    if not crashes:
        return finding
    figures = {**finding.figures, "crashes": list(crashes)}
    return replace(finding, line="; ".join([finding.line, *crashes]), figures=figures)


def child_environment(base: Mapping[str, str], serving: Mapping[str, str]) -> dict[str, str]:
    """The environment of every child: engines in the process itself, and nothing vLLM would have to download.

    Args:
        base: what the user has set, which goes first.
        serving: see `bench.server.serving_environment`.
    """
    wanted = {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # Lanes on disjoint multiprocessors still wait for each other in a shared hardware queue.
        QUEUES_VARIABLE: QUEUES,
        "PYTHONUNBUFFERED": "1",
    }
    return {**wanted, **serving, **base, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class CheckRun:
    """One check: its folder with `raw/` and `logs/`, its device, and how long the present part may still take.

    Args:
        folder: the results folder; made here.
        device: "cuda" or "cpu".
        small: everything in the smallest size that still exercises it.
        environment: of all child processes.
        compiled: whether engines under memory pressure compile their model, as a server does.
    """

    def __init__(
        self, folder: Path, device: str, small: bool, environment: Mapping[str, str], compiled: bool = False
    ) -> None:
        self.folder = folder.resolve()
        self.device = device
        self.small = small
        self.compiled = compiled
        self.environment = dict(environment)
        self.end = float("inf")
        self.starter = Starter()
        self._ran: set[str] = set()
        self._out_of_time: set[str] = set()
        self._crashes: list[str] = []
        for name in ("raw", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def left_s(self) -> float:
        """Seconds the present part has left."""
        return self.end - time.monotonic()

    @property
    def patience_s(self) -> float:
        """An engine that takes longer hangs if stock's did not take as long. It must not take the time of others."""
        return 100.0 if self.device == "cuda" else 300.0

    def raw(self, name: str) -> Any:
        """What the child called `name` returned in this check; None when it has not, whatever lies in the folder."""
        path = self.folder / "raw" / f"{name}.json"
        return json.loads(path.read_text()) if name in self._ran and path.exists() else None

    def ran_out(self, name: str) -> bool:
        """Whether the child called `name` has no result because the clock ended it, or there was no time to start it."""
        return name in self._out_of_time

    def forget_crashes(self) -> list[str]:
        """One sentence for each forked child since the last call that ended without its own doing and was run again."""
        crashes, self._crashes = self._crashes, []
        return crashes

    def run(
        self, name: str, function: str, options: Any, limit_s: float | None = None, fresh: bool = False
    ) -> ChildResult:
        """Calls `function` ("package.module:function") with `options` in a process of its own.

        Its result goes to `raw/NAME.json`, what it writes to `logs/NAME.log`, and the archive is written anew. It ends after
        `limit_s` seconds or when the part's time is up, with everything it started. Waiting for the process to be forked is no
        part of `limit_s`. `fresh`: it needs no vLLM.
        """
        ended = self._run(name, function, options, limit_s, fresh)
        (self._out_of_time.add if ended.out_of_time else self._out_of_time.discard)(name)
        try:
            write_archive(self.folder)
        except OSError as error:
            print(f"  the archive could not be written: {error}", file=sys.stderr, flush=True)
        print(f"  {name}: {ended.status} ({ended.seconds:.0f} s)", flush=True)
        return ended

    def _run(self, name: str, function: str, options: Any, limit_s: float | None, fresh: bool) -> ChildResult:
        result, log = self.folder / "raw" / f"{name}.json", self.folder / "logs" / f"{name}.log"
        for old in (result, log):
            old.unlink(missing_ok=True)
        self._ran.add(name)
        own = min(limit_s or float("inf"), DAY_S)
        if self.left_s() <= STACK_BEFORE_END_S:
            return ChildResult(None, "not started: the time of this part was used up", 0.0, out_of_time=True)
        task = Task(function, result, min(self.left_s(), own), options, log, self.environment)
        child = self.starter.start(task, fresh)
        # The process that forks may still have imported, and forks may have been tried: no time of this task.
        began, left = time.monotonic(), max(self.left_s(), 0.0)
        limit = min(left, own)
        try:
            code = child.wait(limit)
        finally:
            end_group(child)
        if code and (code < 0 or not log.exists()) and self.starter.distrust(child):
            how = f"by signal {-code}" if code < 0 else f"with exit code {code} before its task began"
            crash = f"{name}: a forked process ended {how}, and its task was run again in a new interpreter"
            if log.exists():
                log.replace(log.with_name(f"{name}-forked.log"))
                crash += f" (logs/{name}-forked.log)"
            self._crashes.append(crash)
            return self._run(name, function, options, limit_s, fresh=True)
        return result_of(replace(task, limit_s=limit), name, code, time.monotonic() - began, parts_time=limit == left)
