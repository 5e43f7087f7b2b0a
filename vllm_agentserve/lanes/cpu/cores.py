"""The cores of an OpenMP team: a lane that is alone has all cores, two lanes have disjoint sets."""

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from vllm_agentserve.vllm_compat import cpu


class Cores:
    """The cores that the OpenMP team of this thread runs on.

    Two threads of one team on one core wait for each other until the kernel switches between them: a step of 10 ms then takes
    200 ms. So a team whose threads OpenMP has pinned only changes its size: its first threads are on the first cores. Threads
    that are not pinned are moved.

    Args:
        process: whether every thread of the process belongs to the team; if not, only the calling thread is known to.
    """

    def __init__(self, process: bool = False) -> None:
        self._process = process
        self._pinned = cpu.team_is_pinned()
        self._taken: list[int] | None = None

    def take(self, cores: list[int]) -> None:
        """Called by the thread that computes, before it does. Costs nothing when nothing changes.

        Args:
            cores: the first ones of the worker where the team is pinned.
        """
        if cores == self._taken:
            return
        self._taken = cores
        if not self._pinned:
            for thread in self._threads():
                move(thread, cores)
        cpu.set_threads(len(cores))

    def _threads(self) -> Iterable[int]:
        return [int(task.name) for task in Path("/proc/self/task").iterdir()] if self._process else [0]


def move(thread: int, cores: Iterable[int]) -> None:
    """Puts a thread on those of these cores that the process may use; 0 is the calling thread. Without any such core, it stays.

    A thread may just have ended, and cores may have been taken from the process: neither is a reason to end an engine.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            os.sched_setaffinity(thread, cores)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
