"""An ingress's part of placing calls: what it knows itself, and what it asks the table of pins."""

import asyncio
import contextlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from vllm_agentserve.cluster.caller import Caller
from vllm_agentserve.cluster.table import Reports
from vllm_agentserve.policy.fleet import rendezvous

KNOWN_S = 60.0
"""So long an ingress goes by what the table said of a conversation; then it asks again."""
ASK_S = 5.0
"""So long an ingress waits for a table that does not answer. One whose process has ended is known at once."""
PINNING = ("conserve", "sticky")
"""Policies under which all calls of a conversation go to its engine."""
PINNED = ("pinned", "first", "parent", "crowded", "moved")
"""Reasons of decisions that pin a conversation."""


class Table(Protocol):
    """What is asked of a `PinTable` in another process. Every method may raise any exception where it cannot be reached."""

    async def place(
        self, session: str, tokens: int, parent: str | None, reports: Reports, gone: tuple[str, ...], missed: int
    ) -> tuple[str, str]: ...

    async def finished(self, session: str, engine: str, context_tokens: int, last: bool) -> None: ...

    def turn(self, session: str, tokens: int, engine: str) -> None:
        """Does not wait."""


class Chooser:
    """Chooses engines in one ingress.

    Args:
        table: of pins.
        policy: of the cluster.
        pin_seconds: of the cluster.
        max_known: conversations that are remembered here.
        clock: seconds that do not go back.
    """

    def __init__(
        self,
        table: Table,
        policy: str = "conserve",
        pin_seconds: float = 3600.0,
        max_known: int = 65536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = table
        self._remembers = policy in PINNING
        self._known_s = min(KNOWN_S, pin_seconds)
        self._max_known = max_known
        self._clock = clock
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._seen: dict[str, None] = {}
        """Engines that could be reached when a call was last placed."""
        self._lost: dict[str, None] = {}
        """Engines that are to be named to the table as gone."""
        self._missed = 0
        self.asked = False
        """Whether the table was asked for the engine that was last chosen."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()

    async def choose(self, caller: Caller, tokens: int, reports: Reports, avoid: tuple[str, ...] = ()) -> str:
        """The engine for a call. There must be one.

        Args:
            caller: whose the call is.
            tokens: of its prompt.
            reports: the engines that can be reached, with what each last said of itself.
            avoid: engines that do not answer; they count as gone if there are others.
        """
        left = {name: one for name, one in reports.items() if name not in avoid} or dict(reports)
        self._lost |= dict.fromkeys(name for name in (*self._seen, *reports) if name not in left)
        self._seen = dict.fromkeys(reports)
        now = self._clock()
        engine, until = self._known.get(caller.session, ("", 0.0))
        if engine in left and now < until:
            self._say_turn(caller.session, tokens, engine)
            self.asked = False
            return engine
        gone = tuple(self._lost)
        placing = asyncio.ensure_future(
            self._table.place(caller.session, tokens, caller.parent, left, gone, self._missed)
        )
        try:
            async with asyncio.timeout(ASK_S):
                engine, reason = await asyncio.shield(placing)
        except Exception:
            engine = reason = ""
        except BaseException:
            # Its client has left. The table places the call all the same, and nobody else will tell it that there is none.
            self._leave(placing, caller, tokens)
            raise
        self.asked = True
        if engine not in left:
            self._missed += 1
            return rendezvous(caller.session or f"call {next(self._numbers)}", left)
        self._missed = 0
        for name in gone:
            self._lost.pop(name, None)
        if self._remembers and caller.session and reason in PINNED:
            self._known[caller.session] = (engine, now + self._known_s)
            self._known.move_to_end(caller.session)
            if len(self._known) > self._max_known:
                self._known.popitem(last=False)
        return engine

    def _leave(self, placing: "asyncio.Future[tuple[str, str]]", caller: Caller, tokens: int) -> None:
        """Tells the table that a call which it places after this has ended."""

        async def tell() -> None:
            with contextlib.suppress(Exception):  # it counts one call more
                engine, _ = await placing
                await self._table.finished(caller.session, engine, tokens, caller.last)

        task = asyncio.ensure_future(tell())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _say_turn(self, session: str, tokens: int, engine: str) -> None:
        try:
            self._table.turn(session, tokens, engine)
        except Exception:  # it counts one call less
            return
