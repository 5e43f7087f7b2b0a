"""The ladder of core sets: a lane that is alone has all cores, two lanes have disjoint parts."""

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from vllm_agentserve.vllm_compat import cpu


class Cores:
    """The cores that the OpenMP team of this thread runs on.

    Two threads of one team on one core wait for each other by turns of the kernel's clock, which makes a step of 10 ms one of
    200 ms. So a team that OpenMP has pinned, thread by thread, only changes its size: its first threads are on the first
    cores. The threads of others are moved.

    Args:
        process: whether all threads of the process are the team's, and not only the calling one is known to be.
    """

    def __init__(self, process: bool = False) -> None:
        self._process = process
        self._pinned = cpu.team_is_pinned()
        self._taken: list[int] | None = None

    def take(self, cores: list[int]) -> None:
        """Called by the thread that computes, before it does; costs nothing when nothing changes.

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
    """Puts a thread, 0 is the calling one, on these cores, as far as the process may use them; leaves it where none of them are.

    A thread may just have ended, and somebody else may have taken cores from the process: neither is a reason to end an engine.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            os.sched_setaffinity(thread, cores)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
