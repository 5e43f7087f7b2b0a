"""Child processes forked from one in which vLLM is imported already: on many machines the imports take longer than the task."""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from vllm_agentserve.processes.task import Task
from vllm_agentserve.vllm_compat.cuda import cuda_is_lost

PRELOAD = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm_agentserve.lanes.connector",
    "vllm_agentserve.scheduler.scheduler",
)
"""Imported before the first child is forked: what vLLM's own server has imported when it forks its engine. Models and the GPU
worker are not among them: with them, the first CUDA call of a child was a segmentation fault (H200, driver 580)."""


class ForkedChild:
    """A task in a forked process, which leads a process group of its own."""

    def __init__(self, task: Task) -> None:
        task.result.unlink(missing_ok=True)  # an earlier task's, which could be taken for this one's
        options, environment = json.dumps(task.options), dict(task.environment)
        arguments = (task.function, str(task.result), task.limit_s, options, str(task.log), environment)
        self._process = multiprocessing.get_context("forkserver").Process(target=main, args=arguments)
        with variables(environment):
            self._process.start()
        self.pid = int(self._process.pid or 0)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, negative for a signal; None when it still runs after so many seconds."""
        self._process.join(timeout_s)
        return self._process.exitcode


def preload(modules: tuple[str, ...], environment: Mapping[str, str]) -> None:
    """Starts the process that children are forked from; it imports these modules while the caller goes on. A module that
    cannot be imported is left out. Only the first call in a process has an effect."""
    forkserver.set_forkserver_preload(list(modules))
    with variables(environment):
        forkserver.ensure_running()


@contextmanager
def variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Within it, this process has these environment variables, and no others."""
    before, wanted = dict(os.environ), dict(environment)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(function: str, result: str, limit_s: float, options: str, log: str, environment: dict[str, str]) -> None:
    """The child. Where CUDA was started before the fork it cannot be used, so a new interpreter takes over."""
    from vllm_agentserve.processes import child

    end_with_starter()
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    if cuda_is_lost():
        print("CUDA was started before the fork: a new interpreter takes over", flush=True)
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(reading)
            os.write(writing, options.encode())
            os._exit(0)
        os.close(writing)
        os.dup2(reading, 0)
        os.execve(sys.executable, [sys.executable, "-m", child.__name__, function, result, str(limit_s)], environment)
    child.work(function, Path(result), limit_s, json.loads(options))


def end_with_starter() -> None:
    """This process ends with the one it was forked from. That one ends with the process that started it, namely when no process
    holds its pipe any more, so this child must not hold it either."""
    from vllm_agentserve.processes import child

    child.end_with_parent()
    check = multiprocessing.parent_process()
    if check is not None and not check.is_alive():
        os._exit(1)  # it was killed before we asked
    pipe = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_alive_fd", None)
    if pipe is not None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, pipe, inheritable=False)
        os.close(nothing)


def try_cuda(options: Any) -> bool:
    """A task that only uses CUDA: whether children can be forked here. If anything ends it, a signal too, they cannot."""
    import torch

    return bool(torch.ones(1, device="cuda").item() == 1.0)
