"""A connection to an engine: a `vllm serve` that listens on a Unix socket of this machine."""

import asyncio
import contextlib
import errno
import re
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from vllm_agentserve.cluster.relay import EVENT, Failure, Head, Part, RelayedRequest, WholeEvents, end_to_end, is_stream

ENDING_S = 1.0
"""So long after a request that broke it is looked at whether the engine has ended."""
LOOK_S = 0.1
"""Between two such looks."""
WATCH_S = 1.0
"""Between two questions whether it is healthy."""
UNHEALTHY = 3
"""Such questions in a row that found it ended before what is under way is broken off."""
HEALTH_S = 5.0
LONGEST_HEADER = 1 << 16
"""Bytes. vLLM's own answers may repeat a header of the request."""
CORE_ENDED = "the engine's EngineCore has ended"
STOPPED = "vllm serve has stopped listening"
MARK = ".ended"
"""What is appended to the path of a socket is the name of a file that says to all processes: this engine has ended."""
MARK_S = 1.0
"""A mark that is younger is not taken back: the answer that says otherwise may be older."""
CLOSED = (errno.ECONNREFUSED, errno.ENOENT)
"""Errors of a connection to a socket on which nobody listens."""
OUR_HEADERS = (b"host", b"content-length", b"expect")
"""Headers of a request that are written anew."""
ERROR = re.compile(rb'"error"(?!\s*:\s*null)')
"""In an event that says an error. In texts of a model the quotation marks have a backslash before them."""
ABORTED = re.compile(rb'"(?:finish_reason|stop_reason)"\s*:\s*"abort"')
"""So vLLM ends an answer that it does not finish, also where it is asked to end: as if it were whole."""


class EngineConnection:
    """Asks an engine, and hands requests to it. Made and used within one event loop; asks it every second until it has ended.

    Args:
        socket: the path of its Unix socket.
        end: why its processes have ended; "" while they live, and where that is not known.
    """

    def __init__(self, socket: str, end: Callable[[], str] = lambda: "") -> None:
        import aiohttp

        self.socket = socket
        self._mark = Path(socket + MARK)
        self._end = end
        self.reached = False
        """Whether it has listened there, ready for requests. If it has, and does not any more, it has ended."""
        self._ending = ""
        """Why it will not answer any more, though its server may."""
        self.under_way = 0
        """Requests."""
        self._begun: set[aiohttp.ClientResponse] = set()
        """Answers that are under way."""
        self._look: asyncio.Task[None] | None = None
        self._session = aiohttp.ClientSession(
            # A connection that is kept open may be closed by the server just as a request is sent.
            connector=aiohttp.UnixConnector(socket, limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            auto_decompress=False,
            # Cookies are between a client and the engine. This session is that of all clients.
            cookie_jar=aiohttp.DummyCookieJar(),
            # Only what the client sent goes on.
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            max_line_size=LONGEST_HEADER,
            max_field_size=LONGEST_HEADER,
        )
        self._watch = asyncio.ensure_future(self._end_with_it())

    @property
    def ended(self) -> bool:
        """Whether this process or another one on the machine has seen that it gets no more requests."""
        return bool(self._ending or self._end()) or self._mark.exists()

    @property
    def closed(self) -> bool:
        """Whether it will not be used again."""
        return self._session.closed

    def how_it_ended(self) -> str:
        return self._end() or self._ending or (CORE_ENDED if self._mark.exists() else "vllm serve does not answer")

    async def close(self) -> None:
        """Ends all requests that are under way. Later ones fail."""
        import aiohttp

        await self._session.close()
        for answer in self._begun:
            # A session that closes does not tell those who wait for more of an answer.
            answer.content.set_exception(aiohttp.ClientConnectionError("closed"))

    async def page(self, path: str, timeout_s: float = 5.0) -> bytes | None:
        """The contents of one of its pages; None if it cannot be had in that time."""
        import aiohttp

        if self.closed:
            return None
        try:
            limit = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.get(f"http://engine{path}", timeout=limit) as answer:
                return await answer.read() if answer.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def health(self, timeout_s: float) -> int | None:
        """The status of its page of health; None if it does not answer in that time."""
        import aiohttp

        if self.closed:
            return None
        try:
            limit = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.get("http://engine/health", timeout=limit) as answer:
                if answer.status == 200:
                    self.reached = True
                    self._is_well()
                elif answer.status == 503 and self.reached:
                    # Its server answers for seconds yet: nothing but errors.
                    self._is_ending(CORE_ENDED)
                return answer.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._see(error)
            return None

    def _see(self, error: Exception) -> None:
        """A server that has listened and does not any more ends, whether its process lives or not."""
        if self.reached and getattr(error, "errno", None) in CLOSED:
            self._is_ending(STOPPED)

    def _is_ending(self, why: str) -> None:
        self._ending = self._ending or why
        # The next turn may come to another ingress. The engine's folder is gone where it was stopped.
        with contextlib.suppress(OSError):
            self._mark.touch(mode=0o600, exist_ok=True)

    def _is_well(self) -> None:
        if self._ending == CORE_ENDED:
            self._ending = ""
        with contextlib.suppress(OSError):
            # Clocks may be set.
            if abs(time.time() - self._mark.stat().st_mtime) >= MARK_S:
                self._mark.unlink()

    async def _has_ended(self) -> bool:
        """Whether an error that it has answered was the end of it."""
        await self.health(HEALTH_S)
        return self.ended

    async def answer(self, request: RelayedRequest) -> AsyncGenerator[Part, None]:
        """What it answers: `Head` and bytes, or a `Failure`. The bytes of a stream are whole events, others come as one."""
        if self.ended or self.closed:
            yield Failure(self.how_it_ended(), delivered=False)
            return
        self.under_way += 1
        try:
            async with contextlib.aclosing(self._ask(request)) as parts:
                async for part in parts:
                    yield part
        finally:
            self.under_way -= 1

    async def _end_with_it(self) -> None:
        """Closes the connections of an engine that has ended: a server that is asked to end may leave streams without an end."""
        found = 0
        while not self.closed:
            await asyncio.sleep(WATCH_S)
            if self.reached:
                await self.health(HEALTH_S)
            # Its own errors say more, and come sooner.
            found = found + 1 if self.ended else 0
            if found >= UNHEALTHY:
                await self.close()

    async def _ask(self, request: RelayedRequest) -> AsyncGenerator[Part, None]:
        import aiohttp

        given = end_to_end(request.headers, *OUR_HEADERS)
        headers = [(as_text(name), as_text(value)) for name, value in given]
        answer, begun = None, False
        try:
            async with self._session.request(
                request.method,
                f"http://engine{request.path}",
                headers=headers,
                data=request.body or None,
                allow_redirects=False,
            ) as answer:
                self.reached = True
                self._begun.add(answer)
                sent = end_to_end(answer.raw_headers)
                if not is_stream(sent):
                    content = await answer.read()
                    if self.closed:
                        # As with a stream, see below.
                        raise aiohttp.ClientConnectionError("closed")
                    if (answer.status >= 500 or ABORTED.search(content)) and await self._has_ended():
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
                    if (found := ERROR.search(whole) or ABORTED.search(whole)) and await self._has_ended():
                        # vLLM goes on after its error as after a whole answer.
                        before, end, _ = whole[: found.start()].rpartition(EVENT)
                        if end:
                            yield before + end
                        yield Failure(f"{self.how_it_ended()} in the middle of an answer", delivered=True)
                        return
                    if whole:
                        yield whole
                if self.closed:
                    # To a stream whose end is that of its connection it looks like one.
                    raise aiohttp.ClientConnectionError("closed")
                if rest := events.rest():
                    yield rest
        except aiohttp.ClientConnectorError as error:
            # The request has gone nowhere. A server that listens has too much to do just now.
            self._see(error)
            yield Failure(self.how_it_ended(), delivered=not self.ended)
        except (aiohttp.ClientError, OSError) as error:
            self.reached = True
            await self._known_to_have_ended()
            where = "in the middle of an answer" if begun else "before it answered"
            yield Failure(f"the engine's server went away {where} ({type(error).__name__})", delivered=True)
        finally:
            if answer is not None:
                self._begun.discard(answer)

    async def _known_to_have_ended(self) -> None:
        """Waits a moment: a process that is killed closes its connections first. The next request must not go to it."""
        if self._look is None:
            self._look = asyncio.ensure_future(self._look_at_it())
        # One look for all that broke at once.
        await asyncio.shield(self._look)

    async def _look_at_it(self) -> None:
        deadline = time.monotonic() + ENDING_S
        try:
            while not self.ended and time.monotonic() < deadline:
                await asyncio.sleep(LOOK_S)
                if await self.health(ENDING_S) == 200:
                    return
        finally:
            self._look = None


def as_text(raw: bytes) -> str:
    """A part of a header as aiohttp takes it. It writes texts in UTF-8, so what is in UTF-8 goes on as the bytes it was.

    Other bytes above 127 become two each: aiohttp cannot write them.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
