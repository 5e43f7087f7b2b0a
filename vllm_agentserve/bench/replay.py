"""Runs sessions against one server, closed-loop: a turn starts when the answer before is complete and its tool is done."""

import asyncio
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import perf_counter

from vllm_agentserve.bench.client import Stream, StreamError, StreamingClient
from vllm_agentserve.bench.prompt import Prompt
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.sessions import Session, pinned_token

LATENESS_PERIOD_S = 0.05


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
    ) -> None:
        self.client = client
        self.sessions = {session.name: session for session in sessions}
        self.labels = (arm, round_number, part)
        self.answers = answers
        self.on_turn = on_turn
        self.anonymous = anonymous
        self.suffix = suffix
        self.records: list[Record] = []
        self.lateness_ms: list[float] = []
        self.began = 0.0
        self.ended = 0.0
        self._ended = {name: asyncio.Event() for name in self.sessions}

    @property
    def seconds(self) -> float:
        return (self.ended or perf_counter()) - self.began

    async def run(self) -> list[Record]:
        """Runs all sessions; returns a record of every request, in the order they ended."""
        watch = asyncio.create_task(self._watch_lateness())
        with undisturbed():
            self.began = perf_counter()
            try:
                async with asyncio.TaskGroup() as group:
                    for session in self.sessions.values():
                        if not session.forked:
                            group.create_task(self._start(session))
            finally:
                self.ended = perf_counter()
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

    async def _start(self, session: Session) -> None:
        if session.after is not None:
            await self._ended[session.after].wait()
        # A session that starts by the clock starts then, however late this process wakes up.
        begin = self.began if session.timed else perf_counter()
        await self._run(session, Prompt(), begin + session.start_s)

    async def _run(self, session: Session, context: Prompt, due: float, parent: str | None = None) -> None:
        """Runs a session from `due` on, in seconds of `perf_counter()`."""
        named = not self.anonymous
        try:
            for number, turn in enumerate(session.turns):
                if number or session.forked:
                    due = perf_counter() + turn.tool_s
                else:
                    due += turn.tool_s
                if turn.context is not None:
                    context = Prompt()
                # Prepared while the tool runs.
                await context.extend(turn.added if turn.context is None else turn.context)
                if (left := due - perf_counter()) > 0:
                    await asyncio.sleep(left)
                stream, pinned = Stream(), pinned_token(session.name, number)
                try:
                    await self.client.generate(
                        session.phase(number),
                        context.json,
                        turn.answer,
                        session.name + self.suffix if named else None,
                        stream,
                        fixed=self.answers != "real",
                        pinned=pinned if self.answers == "pinned" else None,
                        parent=parent + self.suffix if named and parent is not None else None,
                        due=due if session.timed else None,
                    )
                except StreamError as error:
                    self._keep(session, number, context, stream, str(error))
                    return
                self._keep(session, number, context, stream, None)
                # A server that does not tell its tokens gets the planned ones back.
                await context.extend(stream.token_ids or [pinned] * len(stream.stamps))
                if turn.spawns:
                    async with asyncio.TaskGroup() as group:
                        for name in turn.spawns:
                            group.create_task(self._run(self.sessions[name], context.copy(), 0.0, session.name))
        finally:
            self._ended[session.name].set()

    def _keep(self, session: Session, turn: int, context: Prompt, stream: Stream, error: str | None) -> None:
        arm, round_number, part = self.labels

        def micros(seconds: float) -> int:
            return int((seconds - self.began) * 1e6)

        self.records.append(
            Record(
                arm=arm,
                round=round_number,
                part=part,
                session=session.name,
                agent=session.agent,
                kind=session.kind,
                phase=session.phase(turn),
                turn=turn,
                prompt=context.digest,
                prompt_tokens=context.tokens,
                wanted_tokens=session.turns[turn].answer,
                cached_tokens=stream.cached_tokens,
                sent_us=micros(stream.sent),
                ended_us=micros(stream.finished),
                stamps_us=[micros(stamp) for stamp in stream.stamps],
                error=error,
                program=session.program,
            )
        )
        self.on_turn()
