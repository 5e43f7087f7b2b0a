"""One engine: a `vllm serve` that listens on a Unix socket, in a folder that no other user can read."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import IO

from vllm_agentserve.bench.server import first_cause
from vllm_agentserve.cluster.connection import EngineConnection
from vllm_agentserve.cluster.relay import Failure, Part, RelayedRequest
from vllm_agentserve.cluster.settings import START_TIMEOUT_S
from vllm_agentserve.processes.group import stop_group

STOP_STEPS = ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0))
"""How a `vllm serve` and all that it started are ended: signals, and the seconds that they get before the next one."""
ASK_S = 0.25
"""Between two questions whether it is healthy."""
IDLE_S = 0.1
"""Between two looks whether it has requests."""
LOG_LINES = 2000
"""Lines of its output that are kept to say why it ended."""
LINE_CHARACTERS = 2000
"""Of such a line, at most."""
CONNECTED = (b"02", b"03")
"""States of a socket in `/proc/net/unix`, see proc(5): a connection that the server has not accepted yet, and one that it has."""


class EngineError(RuntimeError):
    """An engine did not start; the message says why, as far as it is known."""


class Engine:
    """A `vllm serve` and a connection to it.

    Args:
        model: for `vllm serve`.
        options: of `vllm serve`.
        environment: of its process.
        start_timeout_s: how long it may take until it is healthy.
    """

    def __init__(
        self,
        model: str,
        options: Sequence[str],
        environment: Mapping[str, str],
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="agentserve-"))
        self.socket = str(self._folder / "engine")
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model),
            *(*options, "--uds", self.socket),
        ]
        self._environment = dict(environment)
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: EngineConnection | None = None
        self._said: deque[str] = deque(maxlen=LOG_LINES)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def _end(self) -> str:
        code = self._process.poll() if self._process is not None else None
        return f"vllm serve ended with exit code {code}" if code is not None else ""

    def how_it_ended(self) -> str:
        return self._connection.how_it_ended() if self._connection is not None else "vllm serve was not started"

    async def start(self) -> None:
        """Starts it, and returns when it is healthy.

        Raises:
            EngineError: it ended before that, or is not healthy in time. It may still run then: `stop` ends it.
        """
        wrapper = [sys.executable, str(Path(__file__).with_name("child.py")), str(os.getpid())]
        self._process = subprocess.Popen(
            [*wrapper, *self.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        threading.Thread(target=self._pass_on, args=(self._process.stdout,), daemon=True).start()
        threading.Thread(target=self._end_what_it_started, args=(self._process,), daemon=True).start()
        self._connection = EngineConnection(self.socket, self._end)
        deadline = time.monotonic() + self._start_timeout_s
        while not await self.healthy(min(5.0, self._start_timeout_s)):
            if not self.alive:
                raise EngineError(f"{self.how_it_ended()} while starting: {self._cause()}")
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"vllm serve was not healthy within {self._start_timeout_s:g} s (give it more with --start-timeout): "
                    f"{self._cause()}"
                )
            await asyncio.sleep(min(ASK_S, self._start_timeout_s))

    def _cause(self) -> str:
        """What went wrong first, or the last that it said."""
        said = "\n".join(self._said)
        return first_cause(said) or said[-2000:]

    def _pass_on(self, output: IO[bytes]) -> None:
        """Its output becomes ours, which Ray keeps."""
        for line in output:
            text = line.decode(errors="replace").rstrip("\n")
            self._said.append(text[:LINE_CHARACTERS])
            print(text, flush=True)

    def _end_what_it_started(self, process: "subprocess.Popen[bytes]") -> None:
        """Where its server is killed, its EngineCore would go on, and keep the memory that the next one needs."""
        with contextlib.suppress(ChildProcessError):
            # Not reaped: its number stays that of its group.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        if self._process is process:
            # What removes shared memory is in the group too, and gets the time for it.
            stop_group(process, STOP_STEPS)

    async def page(self, path: str, timeout_s: float = 5.0) -> bytes | None:
        """See `EngineConnection.page`."""
        return await self._connection.page(path, timeout_s) if self._connection is not None else None

    async def healthy(self, timeout_s: float) -> bool:
        connection = self._connection
        return (
            self.alive and connection is not None and await connection.health(timeout_s) == 200 and not connection.ended
        )

    async def answer(self, request: RelayedRequest) -> AsyncGenerator[Part, None]:
        """See `EngineConnection.answer`."""
        if self._connection is None or not self.alive:
            yield Failure(self.how_it_ended(), delivered=False)
            return
        async with contextlib.aclosing(self._connection.answer(request)) as parts:
            async for part in parts:
                yield part

    def wait_until_idle(self, most_s: float) -> None:
        """Returns when no request is connected to its socket, it has ended, or that time has passed."""
        deadline = time.monotonic() + most_s
        while self.alive and connected_to(self.socket) and time.monotonic() < deadline:
            time.sleep(IDLE_S)

    def stop(self) -> None:
        """Asks it to end, then makes it; returns when it and all that it started are gone."""
        process, self._process = self._process, None
        if process is not None:
            stop_group(process, STOP_STEPS)
        shutil.rmtree(self._folder, ignore_errors=True)


def connected_to(path: str) -> int:
    """Connections that the server of a Unix socket has: one for each request, since none is kept open.

    0 where that cannot be known.
    """
    try:
        # Names of sockets may be any bytes.
        lines = Path("/proc/net/unix").read_bytes().splitlines()
    except OSError:
        return 0
    fields = (line.split(maxsplit=7) for line in lines)
    return sum(len(one) == 8 and one[5] in CONNECTED and one[7] == os.fsencode(path) for one in fields)
