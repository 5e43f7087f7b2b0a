"""How child processes start and end: forked from one that has imported vLLM where that works, else in a new interpreter."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from vllm_agentserve.processes import child as child_module
from vllm_agentserve.processes.forked import PRELOAD, ForkedChild, preload
from vllm_agentserve.processes.task import DAY_S, ChildError, Task, result_of

FORK_S = 60.0
"""A fork that has not begun after so long, since the imports hang or are slow, is given up for a new interpreter."""
GONE_S = 20.0
TRIAL = "vllm_agentserve.processes.forked:try_cuda"


class Child(Protocol):
    """A process that leads a group of its own."""

    pid: int

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, negative for a signal; None when it still runs after so many seconds."""


class FreshChild:
    """A task in a new interpreter."""

    def __init__(self, task: Task) -> None:
        task.result.unlink(missing_ok=True)  # an earlier task's, which could be taken for this one's
        command = [sys.executable, "-m", child_module.__name__]
        with task.log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, task.function, str(task.result), str(task.limit_s), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=task.environment,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._options: bytes | None = json.dumps(task.options).encode()

    def wait(self, timeout_s: float) -> int | None:
        given, self._options = self._options, None
        try:
            self._process.communicate(given, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return self._process.returncode


class Starter:
    """Starts children."""

    def __init__(self) -> None:
        self._forks = False
        self._untried = False
        """Whether no forked child has used CUDA yet."""

    def prepare(self, device: str, environment: Mapping[str, str]) -> None:
        """Begins to import what engines need in the process that later children are forked from; does not wait for it."""
        with contextlib.suppress(OSError):
            preload(PRELOAD, environment)
            self._forks = True
            self._untried = device == "cuda"

    def start(self, task: Task, fresh: bool) -> Child:
        """Starts a task; `fresh` for one that does not need vLLM, and so need not wait for its imports."""
        if self._forks and not fresh:
            forked = self._forked(task) if self._can_use_cuda(task) else None
            if forked is not None:
                return forked
            self._give_up()
        return FreshChild(task)

    def distrust(self, child: Child) -> bool:
        """A child was ended by a signal that this process has not sent. If it was forked that may be why, so no other will be
        forked; returns whether it was."""
        if not isinstance(child, FreshChild):
            self._give_up()
            return True
        return False

    def _give_up(self) -> None:
        print("children cannot be forked here: each gets a new interpreter", file=sys.stderr, flush=True)
        self._forks = False

    def _can_use_cuda(self, task: Task) -> bool:
        """Whether forked children can use CUDA; tried once, before the first task, with its folder and variables."""
        if not self._untried:
            return True
        self._untried = False
        result, log = (file.with_name(f"fork-trial{file.suffix}") for file in (task.result, task.log))
        trial = self._forked(Task(TRIAL, result, FORK_S, None, log, task.environment))
        if trial is None:
            return False
        try:
            return trial.wait(FORK_S) == 0
        finally:
            end_group(trial)

    def _forked(self, task: Task) -> ForkedChild | None:
        made: list[ForkedChild] = []
        abandoned = threading.Event()

        def fork() -> None:
            # The process that forks has ended, or its socket is gone: whatever is raised, a new interpreter can do the task.
            with contextlib.suppress(Exception):
                child = ForkedChild(task)
                made.append(child)
                if abandoned.is_set():
                    end_group(child)

        thread = threading.Thread(target=fork, daemon=True)
        thread.start()
        thread.join(min(FORK_S, task.limit_s))
        if not made:
            abandoned.set()
        return made[0] if made else None


def end_group(child: Child) -> None:
    """Ends a process that leads a group, and what is left of the group; waits for the process for a while."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        # A forked one may not lead its group yet.
        if child.wait(0.0) is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
    if child.wait(GONE_S) is None:
        print(f"process {child.pid} does not end: it may hang in the driver", file=sys.stderr)


def call(function: str, options: Any, environment: Mapping[str, str], limit_s: float = DAY_S) -> Any:
    """What `function` ("package.module:function") returns for `options` in a new interpreter, as JSON makes of it.

    Raises:
        ChildError: it raised, was ended by a signal, or took longer than `limit_s`; with the last lines it wrote.
    """
    with TemporaryDirectory(prefix="agentserve-child-") as folder:
        task = Task(function, Path(folder, "result.json"), limit_s, options, Path(folder, "log"), environment)
        began = time.monotonic()
        child = FreshChild(task)
        try:
            code = child.wait(limit_s)
        finally:
            end_group(child)
        ended = result_of(task, function, code, time.monotonic() - began)
    if ended.error is not None:
        raise ChildError(ended.error)
    return ended.result
