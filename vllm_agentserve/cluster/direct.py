"""The way from an ingress to an engine of the same machine: straight to the engine's socket, while Ray chooses the engine."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from vllm_agentserve.cluster.connection import EngineConnection

SOCKET, PROCESS = "socket", "process"
"""Under these names an engine tells the path of its socket, and its process in Ray, see `life_of`."""
PROCESS_ENDED = "the engine's process in Ray has ended"
REACH_S = 5.0
"""So long an engine that has not been reached yet may take to say that it is healthy."""
AGAIN_S = 10.0
"""An engine that could not be reached is tried no sooner."""
MOST = 256
"""Engines without requests that are remembered."""


class DirectConnections:
    """An ingress's connections to the engines of its machine.

    An engine whose socket cannot be reached, since it lies in another container, is left to Ray.

    Args:
        clock: seconds that do not go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, EngineConnection] = {}
        self._missed_s: dict[str, float] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def to(self, engine: str, socket: str, process: str = "") -> EngineConnection | None:
        """The connection to an engine; None if it has never been reached.

        Args:
            engine: its name, which no engine after it has.
            socket: the path of its socket; "" if it has told none.
            process: its process in Ray, see `life_of`. With it the engine ends, though its server may answer for seconds yet.
        """
        if not socket or self._clock() - self._missed_s.get(engine, -AGAIN_S) < AGAIN_S:
            return None
        known = self._known.pop(engine, None) or EngineConnection(socket, end_with(process))
        # The one that was asked for last stands last.
        self._known[engine] = known
        self._forget()
        if known.reached or await known.health(REACH_S) == 200:
            self._missed_s.pop(engine, None)
            return known
        self._missed_s[engine] = self._clock()
        return None

    def _forget(self) -> None:
        """Engines that have ended for good, and of too many without requests those that have not been asked for longest."""
        names = [name for name, one in self._known.items() if one.closed]
        idle = [name for name, one in self._known.items() if name not in names and not one.under_way]
        names += idle[: max(len(idle) - MOST, 0)]
        for name in names:
            self._missed_s.pop(name, None)
            task = asyncio.ensure_future(self._known.pop(name).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def life_of(pid: int) -> str:
    """A process by its number and the time that it was started; "" if it does not live, or is not visible here."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    # See proc_pid_stat(5): the fields after the name; zombies have ended.
    return "" if state in "ZX" else f"{pid} {rest[18]}"


def end_with(process: str) -> Callable[[], str]:
    """Says why an engine has ended once this process of the machine has. One that is not visible here is not looked at."""
    pid = process.partition(" ")[0]
    if not pid.isdigit() or life_of(int(pid)) != process:
        return lambda: ""
    return lambda: "" if life_of(int(pid)) == process else PROCESS_ENDED
