"""One engine: a `vllm serve` that listens on a Unix socket, in a folder that no other user can read."""

import asyncio
import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vllm_agentserve.bench.server import first_cause
from vllm_agentserve.cluster.relay import EVENT, Failure, Head, Part, RelayedRequest, WholeEvents, end_to_end, is_stream
from vllm_agentserve.cluster.settings import START_TIMEOUT_S
from vllm_agentserve.processes.group import stop_group

if TYPE_CHECKING:
    import aiohttp

STOP_STEPS = ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0))
"""How a `vllm serve` and all that it started are ended: signals, and the seconds that they get before the next one."""
ENDING_S = 1.0
ASK_S = 0.25
"""Between two questions whether it is healthy."""
HEALTH_S = 5.0
LOG_LINES = 2000
"""Lines of its output that are kept to say why it ended."""
LINE_CHARACTERS = 2000
"""Of such a line, at most."""
CLOSED = (errno.ECONNREFUSED, errno.ENOENT)
"""Errors of a connection to a socket on which nobody listens."""
OUR_HEADERS = (b"host", b"content-length", b"expect")
"""Headers of a request that are written anew."""


ERROR = re.compile(rb'"error"(?!\s*:\s*null)')
"""In an event that says an error. In texts of a model the quotation marks have a backslash before them."""


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
        self._socket = str(self._folder / "engine")
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model),
            *(*options, "--uds", self._socket),
        ]
        self._environment = dict(environment)
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None
        self._said: deque[str] = deque(maxlen=LOG_LINES)
        self._started = False
        self._ending = ""
        """Why it will not answer any more, though its server may."""

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def how_it_ended(self) -> str:
        code = self._process.poll() if self._process is not None else None
        if code is None and self._ending:
            return self._ending
        return f"vllm serve ended with exit code {code}" if code is not None else "vllm serve does not answer"

    async def start(self) -> None:
        """Starts it, and returns when it is healthy.

        Raises:
            EngineError: it ended before that, or is not healthy in time. It may still run then: `stop` ends it.
        """
        import aiohttp

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
        self._session = aiohttp.ClientSession(
            # A connection that is kept open may be closed by the server just as a request is sent.
            connector=aiohttp.UnixConnector(self._socket, limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            auto_decompress=False,
            # Cookies are between a client and the engine. This session is that of all clients.
            cookie_jar=aiohttp.DummyCookieJar(),
            # Only what the client sent goes on.
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
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
        self._started = True

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
        """The contents of one of its pages; None if it cannot be had in that time."""
        import aiohttp

        if self._session is None:
            return None
        try:
            limit = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.get(f"http://engine{path}", timeout=limit) as answer:
                return await answer.read() if answer.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def healthy(self, timeout_s: float) -> bool:
        return self.alive and await self._health(timeout_s) == 200 and not self._ending

    async def _health(self, timeout_s: float) -> int | None:
        """The status of its page of health; None if it does not answer in that time."""
        import aiohttp

        if self._session is None:
            return None
        try:
            limit = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.get("http://engine/health", timeout=limit) as answer:
                if self._started and answer.status == 503:
                    # Its server answers for seconds yet: nothing but errors.
                    self._ending = "the engine's EngineCore has ended"
                return answer.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._see(error)
            return None

    def _see(self, error: Exception) -> None:
        """A server that has listened and does not any more ends, whether its process lives or not."""
        if self._started and getattr(error, "errno", None) in CLOSED:
            self._ending = self._ending or "vllm serve has stopped listening"

    async def _has_ended(self) -> bool:
        """Whether an error that it has answered was the end of it."""
        await self._health(HEALTH_S)
        return bool(self._ending) or not self.alive

    async def answer(self, request: RelayedRequest) -> AsyncIterator[Part]:
        """What it answers: `Head` and bytes, or a `Failure`. The bytes of a stream are whole events, others come as one."""
        import aiohttp

        if self._session is None or not self.alive or self._ending:
            yield Failure(self.how_it_ended(), delivered=False)
            return
        given = end_to_end(request.headers, *OUR_HEADERS)
        headers = [(as_text(name), as_text(value)) for name, value in given]
        begun = False
        try:
            async with self._session.request(
                request.method,
                f"http://engine{request.path}",
                headers=headers,
                data=request.body or None,
                allow_redirects=False,
            ) as answer:
                sent = end_to_end(answer.raw_headers)
                if not is_stream(sent):
                    content = await answer.read()
                    if answer.status >= 500 and await self._has_ended():
                        # It may have been this request that ended it.
                        yield Failure(f"{self.how_it_ended()} before it answered", delivered=True)
                        return
                    yield Head(answer.status, sent)
                    yield content
                    return
                yield Head(answer.status, sent)
                begun = True
                events = WholeEvents()
                async for more in answer.content.iter_any():
                    whole = events.feed(more)
                    if (found := ERROR.search(whole)) and await self._has_ended():
                        # vLLM goes on after its error as after a whole answer.
                        before, end, _ = whole[: found.start()].rpartition(EVENT)
                        if end:
                            yield before + end
                        yield Failure(f"{self.how_it_ended()} in the middle of an answer", delivered=True)
                        return
                    if whole:
                        yield whole
                if rest := events.rest():
                    yield rest
        except aiohttp.ClientConnectorError as error:
            # The request has gone nowhere. A server that listens has too much to do just now.
            self._see(error)
            yield Failure(self.how_it_ended(), delivered=self.alive and not self._ending)
        except (aiohttp.ClientError, OSError) as error:
            await self._known_to_have_ended()
            where = "in the middle of an answer" if begun else "before it answered"
            yield Failure(f"the engine's server went away {where} ({type(error).__name__})", delivered=True)

    async def _known_to_have_ended(self) -> None:
        """Waits a moment: a process that is killed closes its connections first. The next request must not go to it."""
        deadline = time.monotonic() + ENDING_S
        while self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """Asks it to end, then makes it; returns when it and all that it started are gone."""
        process, self._process = self._process, None
        if process is not None:
            stop_group(process, STOP_STEPS)
        shutil.rmtree(self._folder, ignore_errors=True)


def as_text(raw: bytes) -> str:
    """A part of a header as aiohttp takes it. It writes texts in UTF-8, so what is in UTF-8 goes on as the bytes it was.

    Other bytes above 127 become two each: aiohttp cannot write them.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
