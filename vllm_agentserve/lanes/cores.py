"""The ladder of core sets: a lane that is alone has all cores, two lanes have disjoint halves."""

import os

from vllm_agentserve import vllm_compat


class Cores:
    """The cores this thread and its OpenMP team run on.

    Args:
        own: while the other lane has work too.
        every: while it has not.
    """

    def __init__(self, own: list[int], every: list[int]) -> None:
        self.own = own
        self.every = every
        self._taken: list[int] | None = None

    def take(self, alone: bool) -> None:
        """Called by the thread that computes, before it does; costs nothing when nothing changes."""
        wanted = self.every if alone else self.own
        if wanted is not self._taken:
            self._taken = wanted
            os.sched_setaffinity(0, wanted)
            vllm_compat.set_threads(len(wanted))
