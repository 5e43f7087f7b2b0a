"""Runs sessions against one server, closed-loop: a turn starts when the answer before is complete and its tool is done."""

import asyncio
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import perf_counter
from zlib import crc32

from vllm_agentserve.bench.client import Stream, StreamError, StreamingClient
from vllm_agentserve.bench.live import LiveSessions
from vllm_agentserve.bench.prompt import GrowingPrompt
from vllm_agentserve.bench.recorder import Recorder
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.sessions import CRITICAL, ONE_SHOT, Session, TurnKey, pinned_token, session_walk, spawning
from vllm_agentserve.bench.walk import DueCall

LATENESS_PERIOD_S = 0.05
PREPARE_AHEAD_S = 1.0
"""So long before a turn is due its prompt is prepared; earlier, all prompts of a long workload would be in memory at once."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection, and the processor at once when a token arrives, where the system lets us ask for it.

    The client needs a few percent of a core; on a machine where the server takes all cores it would stamp tokens
    milliseconds late otherwise. Servers are started outside of this and keep their own priority.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        with suppress(PermissionError):
            os.sched_setscheduler(0, *before)


class Replay:
    """All sessions of a workload against one server.

    A request that fails ends its session, and with it those that fork from it; the others go on.

    Args:
        client: an open client.
        answers: "pinned" (the planned number of one planned token), "fixed" (the planned number of whatever the model says)
            or "real" (as the model likes, up to that number).
        on_turn: called after every request.
        anonymous: requests say neither which session they belong to nor which one spawned it.
        suffix: appended to every session id that is sent, so that a server which has seen these sessions before takes
            them for new ones.
        live: sessions under way at most, those they spawn and single calls not counted. The others wait in order of their
            start; times are counted from then on.
        last: the last call of a session says so, unless another session spawned it, or it spawns others; single calls do not.
        ranks: data-parallel engines among which sessions are shared out, those they spawn with them; None leaves it to the
            server.
    """

    def __init__(
        self,
        client: StreamingClient,
        sessions: Sequence[Session],
        arm: str = "",
        round_number: int = 0,
        part: str = "measured",
        answers: str = "pinned",
        on_turn: Callable[[], None] = lambda: None,
        anonymous: bool = False,
        suffix: str = "",
        live: int | None = None,
        last: bool = False,
        ranks: int | None = None,
    ) -> None:
        self.client = client
        self.sessions = {session.name: session for session in sessions}
        self._recorder = Recorder(arm, round_number, part)
        self.answers = answers
        self.on_turn = on_turn
        self.anonymous = anonymous
        self.suffix = suffix
        self._tells_last = last
        self._ranks = ranks
        self.lateness_ms: list[float] = []
        self._ended = 0.0
        self._walk = session_walk(sessions)
        self._spawned_by = {name: key.session for name, key in spawning(sessions).items()}
        self._spawned_by |= {session.name: session.parent for session in sessions if session.parent is not None}
        self._live = LiveSessions(live, self._spawned_by)
        self._may_begin: dict[str, asyncio.Event] = {}
        self._contexts: dict[str, GrowingPrompt] = {}
        """By session: what was sent and answered, while a later turn or another session goes on from it."""
        self._forks = {session.name: len(session.turns[-1].spawns) for session in sessions}
        """By session: how many have not begun yet that fork from its last turn."""

    @property
    def records(self) -> list[Record]:
        return self._recorder.records

    @property
    def seconds(self) -> float:
        """How long it took, or has taken until now."""
        return (self._ended or perf_counter()) - self._recorder.began

    async def run(self) -> list[Record]:
        """Runs all sessions; returns a record of every request, in the order they ended."""
        watch = asyncio.create_task(self._watch_lateness())
        with undisturbed():
            try:
                async with asyncio.TaskGroup() as group:
                    self._start(group, self._walk.begin(self._recorder.begin()))
            finally:
                self._ended = perf_counter()
                watch.cancel()
        return self.records

    async def _watch_lateness(self) -> None:
        """How late this process wakes up: what a busy machine, or a busy client, adds to every stamp."""
        due = perf_counter() + LATENESS_PERIOD_S
        try:
            while True:
                await asyncio.sleep(due - perf_counter())
                self.lateness_ms.append((perf_counter() - due) * 1000)
                due = perf_counter() + LATENESS_PERIOD_S
        finally:
            # It was cancelled; where it should have woken up before, it is late by now.
            if perf_counter() > due:
                self.lateness_ms.append((perf_counter() - due) * 1000)

    def _start(self, group: asyncio.TaskGroup, turns: Sequence[DueCall[TurnKey]]) -> None:
        for due in turns:
            group.create_task(self._run(group, due))

    async def _run(self, group: asyncio.TaskGroup, due: DueCall[TurnKey]) -> None:
        """Runs one turn when it is due, and starts those that it was the last to be waited for by."""
        session, number = self.sessions[due.name.session], due.name.number
        turn, last = session.turns[number], number == len(session.turns) - 1
        if session.forked and not number:
            # Its parent's context may go on to grow.
            context = self._context(session, number)
            await self._wait_until(due.at_s - PREPARE_AHEAD_S)
        else:
            await self._wait_until(due.at_s - PREPARE_AHEAD_S)
            if self._takes_place(session) and not number:
                await self._wait_until(due.at_s)
                await self._wait_for_place(session)
            context = self._context(session, number)
        # Prepared while the tool runs.
        await context.extend(turn.added if turn.context is None else turn.context)
        await self._wait_until(due.at_s)
        stream, pinned = Stream(), pinned_token(session.name, number)
        try:
            await self.client.generate(
                session.phase(number),
                context.json,
                turn.answer,
                None if session.kind == ONE_SHOT else self._named(session.name),
                stream,
                fixed=self.answers != "real",
                pinned=pinned if self.answers == "pinned" else None,
                parent=self._named(self._spawned_by.get(session.name)),
                due=due.at_s if session.timed or (self._live.limited and not number) else None,
                last=self._says_last(session, number),
                rank=self._rank(session.name),
                priority=turn.priority,
                critical=session.kind == CRITICAL,
            )
        except StreamError as error:
            self._leave(session)
            self._keep(session, number, context, stream, str(error))
            self._contexts.pop(session.name, None)
            self._start(group, self._walk.fail(due.name, perf_counter()))
            return
        if last:
            self._leave(session)
        self._keep(session, number, context, stream, None)
        if turn.spawns or not (last or session.turns[number + 1].context is not None):
            # A server that does not tell its tokens gets the planned ones back.
            await context.extend(stream.token_ids or [pinned] * len(stream.stamps))
        else:
            del self._contexts[session.name]
        self._start(group, self._walk.end(due.name, perf_counter()))

    def _says_last(self, session: Session, number: int) -> bool:
        """Whether a call says that its session ends with it. A single call belongs to none."""
        if not self._tells_last or session.kind == ONE_SHOT or session.name in self._spawned_by:
            return False
        return number == len(session.turns) - 1 and not session.turns[number].spawns

    def _rank(self, session: str) -> int | None:
        """The engine of a session and of all that it spawns, the same in every arm."""
        if self._ranks is None:
            return None
        while session in self._spawned_by:
            session = self._spawned_by[session]
        return crc32(session.encode()) % self._ranks

    async def _wait_until(self, at_s: float) -> None:
        if (left := at_s - perf_counter()) > 0:
            await asyncio.sleep(left)

    async def _wait_for_place(self, session: Session) -> None:
        if not self._live.begin(session.name):
            free = self._may_begin[session.name] = asyncio.Event()
            await free.wait()

    def _takes_place(self, session: Session) -> bool:
        """Whether a session takes one of the places there are for sessions under way. Single calls are no sessions."""
        return self._live.limited and session.name not in self._spawned_by and session.kind != ONE_SHOT

    def _leave(self, session: Session) -> None:
        """A session is over."""
        if (following := self._live.end(session.name)) is not None:
            self._may_begin.pop(following).set()

    def _context(self, session: Session, number: int) -> GrowingPrompt:
        """The prompt that a turn goes on from; its own from now on."""
        if session.turns[number].context is not None or (number == 0 and not session.forked):
            self._contexts[session.name] = GrowingPrompt()
        elif number == 0:
            parent = self._spawned_by[session.name]
            self._contexts[session.name] = self._contexts[parent].copy()
            if session.name in self.sessions[parent].turns[-1].spawns:
                self._forks[parent] -= 1
                if not self._forks[parent]:
                    del self._contexts[parent]
        return self._contexts[session.name]

    def _named(self, session: str | None) -> str | None:
        """The id under which a session is sent."""
        return None if self.anonymous or session is None else session + self.suffix

    def _keep(self, session: Session, number: int, context: GrowingPrompt, stream: Stream, error: str | None) -> None:
        self._recorder.add(
            session,
            number,
            context.digest,
            context.tokens,
            stream.cached_tokens,
            stream.sent,
            stream.finished,
            stream.stamps,
            error,
        )
        self.on_turn()
