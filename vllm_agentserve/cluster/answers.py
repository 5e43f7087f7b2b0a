"""Answers of an engine on their way to a client: under the engine's name, and counted at the table of pins."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Protocol

from vllm_agentserve.cluster.load import PER_CHARACTER, TokenRate
from vllm_agentserve.cluster.relay import ENGINE_HEADER, EVENT, USAGE_BYTES, Head, Part, RelayedRequest, usage


class EndedCalls(Protocol):
    """What is told of calls that have ended."""

    async def finished(self, session: str, engine: str, context_tokens: int, last: bool) -> None: ...


class Answers:
    """Passes answers on in one process, and tells the table of pins how long each context has become.

    Args:
        table: of pins. Where it cannot be told, it is told of the next call.
    """

    def __init__(self, table: EndedCalls) -> None:
        self._table = table
        self._rate = TokenRate()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def per_character(self) -> float | None:
        """Tokens per character of the prompts that were answered here; None before an answer has named its usage."""
        return self._rate.per_character

    async def of(
        self, engine: str, request: RelayedRequest, parts: AsyncGenerator[Part, None]
    ) -> AsyncGenerator[Part, None]:
        """The parts of an answer, with the engine's name in its head. The table is told when they end, however they end."""
        tail, events = b"", 0
        try:
            async with contextlib.aclosing(parts):
                async for part in parts:
                    if isinstance(part, Head):
                        yield Head(part.status, (*part.headers, (ENGINE_HEADER, engine.encode())))
                        continue
                    if isinstance(part, bytes):
                        tail = (tail + part)[-USAGE_BYTES:]
                        events += part.count(EVENT)
                    yield part
        finally:
            self._note(engine, request, tail, events)

    def left(self, engine: str, request: RelayedRequest) -> None:
        """A call that was placed there has ended before the engine had it."""
        self._note(engine, request, b"", 0)

    def _note(self, engine: str, request: RelayedRequest, tail: bytes, events: int) -> None:
        if request.engine:
            return  # the table has not placed it
        caller, known = request.caller, usage(tail)
        if known is not None:
            prompt, answer = known
            self._rate.saw(caller.characters, prompt - caller.tokens)
        else:
            prompt, answer = caller.prompt_tokens(self.per_character or PER_CHARACTER), events
        self.soon(self._table.finished(caller.session, engine, prompt + answer, caller.last))

    def soon(self, telling: Coroutine[Any, Any, None]) -> None:
        """Tells the table something without waiting for it."""
        task = asyncio.ensure_future(quietly(telling))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def quietly(telling: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(Exception):  # the table is told of the next one
        await telling
