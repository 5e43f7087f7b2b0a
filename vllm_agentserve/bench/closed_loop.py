"""Sessions against an engine in this process, closed-loop: a turn is due when the answer before and its tool are done."""

import gc
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any

from vllm_agentserve.bench.records import Record, digest
from vllm_agentserve.bench.sessions import PARENT_HINT, Session


@dataclass
class Turn:
    """One request under way; times in seconds of `perf_counter`."""

    session: Session
    number: int
    prompt: list[int]
    due: float
    stamps: list[float] = field(default_factory=list)
    cached: int | None = None


@dataclass
class _Join:
    """A session that waits for those it spawned, and the number and context of its next turn."""

    awaited: set[str]
    number: int
    context: list[int]


class ClosedLoop:
    """All sessions of a workload, in step with one engine.

    The engine's answers are in planned length and whatever the model says. A request counts as sent when it was due, also
    when the engine was in the middle of a step: so waiting for that step is part of the time to the first token.

    Args:
        engine: an `LLMEngine`.
        sessions: forked ones are started by those that spawn them.
        arm, round_number: what the records are to say.
        told: whether requests carry the id of their session and name the one that spawned it.
    """

    def __init__(
        self, engine: Any, sessions: Sequence[Session], arm: str = "", round_number: int = 0, told: bool = False
    ) -> None:
        self.engine = engine
        self.sessions = sessions
        self.labels = arm, round_number
        self.told = told
        self.records: list[Record] = []
        self.began = 0.0
        self.seconds = 0.0
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Turn]] = []
        self._running: dict[str, Turn] = {}
        self._by_name = {session.name: session for session in sessions}
        self._spawned_by: dict[str, str] = {}
        self._joins: dict[str, _Join] = {}
        """By session that waits for others: whom it waits for, and how it goes on."""

    def run(self) -> list[Record]:
        """Runs all sessions; returns a record of every request, in the order they ended."""
        gc.collect()
        gc.freeze()
        self.began = perf_counter()
        for session in self.sessions:
            if session.after is None and not session.forked:
                self._plan(session, 0, [], self.began + session.start_s)
        while self._due or self._running:
            now = perf_counter()
            while self._due and self._due[0][0] <= now:
                self._send(heapq.heappop(self._due)[2])
            if not self._running:
                sleep(max(self._due[0][0] - perf_counter(), 0.0))
                continue
            outputs = self.engine.step()
            now = perf_counter()
            for output in outputs:
                self._receive(output, now)
        self.seconds = perf_counter() - self.began
        gc.unfreeze()
        return self.records

    def _plan(self, session: Session, number: int, context: list[int], due: float) -> None:
        turn = Turn(session, number, [*context, *session.turns[number].added], due)
        heapq.heappush(self._due, (due, next(self._numbers), turn))

    def _send(self, turn: Turn) -> None:
        from vllm import SamplingParams

        wanted = turn.session.turns[turn.number].answer
        parameters = SamplingParams(max_tokens=wanted, ignore_eos=True, temperature=0.0, detokenize=False)
        name = f"{turn.session.name}/{turn.number}"
        more: dict[str, Any] = {}
        if self.told:
            more["session_id"] = turn.session.name
            if turn.session.name in self._spawned_by:
                parameters.extra_args = {PARENT_HINT: self._spawned_by[turn.session.name]}
        self.engine.add_request(name, {"prompt_token_ids": turn.prompt}, parameters, **more)
        self._running[name] = turn

    def _receive(self, output: Any, now: float) -> None:
        turn = self._running[output.request_id]
        tokens = output.outputs[0].token_ids
        turn.stamps += [now] * (len(tokens) - len(turn.stamps))
        turn.cached = output.num_cached_tokens if turn.cached is None else turn.cached
        if output.finished:
            del self._running[output.request_id]
            self.records.append(self._record(turn, now))
            self._follow(turn, list(tokens), now)

    def _follow(self, turn: Turn, tokens: list[int], now: float) -> None:
        session, context = turn.session, turn.prompt + tokens
        spawns = session.turns[turn.number].spawns
        if not spawns:
            self._go_on(session, turn.number + 1, context, now)
            return
        self._joins[session.name] = _Join(set(spawns), turn.number + 1, context)
        for name in spawns:
            self._spawned_by[name] = session.name
            forked = self._by_name[name]
            self._plan(forked, 0, context, now + forked.turns[0].tool_s)

    def _go_on(self, session: Session, number: int, context: list[int], now: float) -> None:
        if number < len(session.turns):
            self._plan(session, number, context, now + session.turns[number].tool_s)
            return
        for later in self.sessions:
            if later.after == session.name:
                self._plan(later, 0, [], now + later.start_s)
        parent = self._spawned_by.get(session.name)
        if parent is not None:
            join = self._joins[parent]
            join.awaited.discard(session.name)
            if not join.awaited:
                self._go_on(self._by_name[parent], join.number, join.context, now)

    def _record(self, turn: Turn, now: float) -> Record:
        arm, round_number = self.labels

        def micros(seconds: float) -> int:
            return int((seconds - self.began) * 1e6)

        return Record(
            arm=arm,
            round=round_number,
            part="measured",
            session=turn.session.name,
            agent=turn.session.agent,
            kind=turn.session.kind,
            phase=turn.session.phase(turn.number),
            turn=turn.number,
            prompt=digest(turn.prompt),
            prompt_tokens=len(turn.prompt),
            wanted_tokens=turn.session.turns[turn.number].answer,
            cached_tokens=turn.cached,
            sent_us=micros(turn.due),
            ended_us=micros(now),
            stamps_us=[micros(stamp) for stamp in turn.stamps],
            program=turn.session.program,
        )
