"""A proxy before a server that remembers what a client sends: headers and bodies. Streams pass as they come."""

import asyncio
import json
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web

from vllm_agentserve.policy.clients import HEADERS, client_hints

HOP_BY_HOP = frozenset({"connection", "host", "content-length", "transfer-encoding", "keep-alive"})
LARGEST = 64 << 20


@dataclass
class Sent:
    """One request: its path, its headers by name in lower case, its body where that is JSON, and whether its client left."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any] = field(default_factory=dict)
    left: bool = False

    @property
    def names(self) -> dict[str, Any]:
        """What it says of its session in any form that we or vLLM read."""
        known = {name: value for name, value in self.headers.items() if name in HEADERS}
        named = {"session_id": self.body["session_id"]} if self.body.get("session_id") else {}
        if "x-session-id" in known:
            named["X-Session-ID"] = known["x-session-id"]
        return named | client_hints(known, self.body)


LAST_EVENTS = (b"data: [DONE]", b"event: message_stop", b"event: response.completed")


def ends_stream(data: bytes) -> bool:
    """Whether this part of a stream has its last event."""
    return any(event in data for event in LAST_EVENTS)


class RecordingProxy:
    """A context manager; in a thread of its own, so that the test may wait for a client.

    Args:
        url: of the server behind it, without a path.
    """

    def __init__(self, url: str) -> None:
        self._behind = url
        self.requests: list[Sent] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def generated(self) -> list[Sent]:
        """The requests that ask for tokens."""
        return [one for one in self.requests if one.body]

    def __enter__(self) -> "RecordingProxy":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _open(self) -> None:
        self._session = ClientSession(timeout=ClientTimeout(total=None), auto_decompress=False)
        application = web.Application(client_max_size=LARGEST)
        application.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(application, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        content = await request.read()
        sent = Sent(request.path, {name.lower(): value for name, value in request.headers.items()})
        if content:
            sent.body = json.loads(content)
        self.requests.append(sent)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        url = self._behind + request.path_qs
        whole, data = False, b""
        try:
            async with self._session.request(request.method, url, data=content or None, headers=headers) as answer:
                kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
                response = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                async for data in answer.content.iter_any():
                    await response.write(data)
                whole = True
                await response.write_eof()
                return response
        except (asyncio.CancelledError, ConnectionError):
            # Clients close a stream when they have read its last event, before the connection says that nothing more comes.
            sent.left = not (whole or ends_stream(data))
            raise
