"""Agents against an engine in this process, closed-loop: a turn is due when the answer before and its tool are done."""

import gc
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter, sleep
from typing import Any

import msgspec

from vllm_agentserve.bench.records import Record, digest
from vllm_agentserve.bench.sessions import Session, warm_up_of
from vllm_agentserve.bench.workloads import REACT, Shape, draw_sessions
from vllm_agentserve.gpucheck.engines import Setting, counters, make_engine


@dataclass
class Turn:
    """One request under way; times in seconds of `perf_counter`."""

    session: Session
    number: int
    prompt: list[int]
    due: float
    stamps: list[float] = field(default_factory=list)
    cached: int | None = None


class ClosedLoop:
    """All sessions of a workload, in step with one engine.

    The engine's answers are in planned length and whatever the model says. A request counts as sent when it was due, also
    when the engine was in the middle of a step: so waiting for that step is part of the time to the first token.

    Args:
        engine: an `LLMEngine`.
        sessions: without forks.
        arm, round_number: what the records are to say.
    """

    def __init__(self, engine: Any, sessions: Sequence[Session], arm: str = "", round_number: int = 0) -> None:
        self.engine = engine
        self.sessions = sessions
        self.labels = arm, round_number
        self.records: list[Record] = []
        self.began = 0.0
        self.seconds = 0.0
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Turn]] = []
        self._running: dict[str, Turn] = {}

    def run(self) -> list[Record]:
        """Runs all sessions; returns a record of every request, in the order they ended."""
        gc.collect()
        gc.freeze()
        self.began = perf_counter()
        for session in self.sessions:
            if session.after is None:
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
        self.engine.add_request(name, {"prompt_token_ids": turn.prompt}, parameters)
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
        session, number = turn.session, turn.number + 1
        if number < len(session.turns):
            self._plan(session, number, turn.prompt + tokens, now + session.turns[number].tool_s)
            return
        for later in self.sessions:
            if later.after == session.name:
                self._plan(later, 0, [], now + later.start_s)

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
        )


def replay(options: Mapping[str, Any]) -> dict[str, Any]:
    """One arm of one round, in a child process: a warm-up with other tokens, then the agents.

    Args:
        options: `setting` (of `Setting`), `shape` (of `workloads.Shape`), `stagger_s` (between the first starts of two
            agents), `seed` and `round`.
    """
    setting = Setting(**options["setting"])
    began = perf_counter()
    llm = make_engine(setting)
    started_s = perf_counter() - began
    workload = replace(REACT, stagger_s=options["stagger_s"])
    sessions = draw_sessions(workload, Shape(**options["shape"]), options["seed"])
    ClosedLoop(llm.llm_engine, warm_up_of(sessions, str(options["seed"]))).run()
    before = counters(llm)
    loop = ClosedLoop(llm.llm_engine, sessions, setting.arm, options["round"])
    records = loop.run()
    return {
        "records": msgspec.to_builtins(records),
        "seconds": loop.seconds,
        "start_s": started_s,
        "counters": {name: value - before[name] for name, value in counters(llm).items()},
    }
