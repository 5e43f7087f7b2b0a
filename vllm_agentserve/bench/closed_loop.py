"""Sessions against an engine in this process, closed-loop: a turn is due when the answer before and its tool are done."""

import gc
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any

from vllm_agentserve.bench.recorder import Recorder
from vllm_agentserve.bench.records import Record, digest
from vllm_agentserve.bench.sessions import PARENT_HINT, Place, Session, session_walk, spawning
from vllm_agentserve.bench.walk import Due


@dataclass
class Request:
    """One request on its way; times in seconds of `perf_counter`."""

    place: Place
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
        sessions: forked ones are started by those that spawn them.
        arm, round_number: what the records are to say.
        told: whether requests carry the id of their session and name the one that spawned it.
    """

    def __init__(
        self, engine: Any, sessions: Sequence[Session], arm: str = "", round_number: int = 0, told: bool = False
    ) -> None:
        self.engine = engine
        self.told = told
        self.seconds = 0.0
        self._recorder = Recorder(arm, round_number, "measured")
        self._sessions = {session.name: session for session in sessions}
        self._spawned_by = {name: place[0] for name, place in spawning(sessions).items()}
        self._walk = session_walk(sessions)
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Place]] = []
        self._running: dict[str, Request] = {}
        self._contexts: dict[str, list[int]] = {}
        """By session: what was sent and answered."""

    @property
    def records(self) -> list[Record]:
        return self._recorder.records

    def run(self) -> list[Record]:
        """Runs all sessions; returns a record of every request, in the order they ended."""
        gc.collect()
        gc.freeze()
        self._plan(self._walk.begin(self._recorder.begin()))
        while self._due or self._running:
            now = perf_counter()
            while self._due and self._due[0][0] <= now:
                due, _, place = heapq.heappop(self._due)
                self._send(place, due)
            if not self._running:
                sleep(max(self._due[0][0] - perf_counter(), 0.0))
                continue
            outputs = self.engine.step()
            now = perf_counter()
            for output in outputs:
                self._receive(output, now)
        self.seconds = perf_counter() - self._recorder.began
        gc.unfreeze()
        return self.records

    def _plan(self, turns: Sequence[Due[Place]]) -> None:
        for due in turns:
            heapq.heappush(self._due, (due.at_s, next(self._numbers), due.name))

    def _send(self, place: Place, due: float) -> None:
        from vllm import SamplingParams

        session, turn = self._sessions[place[0]], self._sessions[place[0]].turns[place[1]]
        parameters = SamplingParams(max_tokens=turn.answer, ignore_eos=True, temperature=0.0, detokenize=False)
        spawner = self._spawned_by.get(session.name)
        more: dict[str, Any] = {}
        if self.told:
            more["session_id"] = session.name
            if spawner is not None:
                parameters.extra_args = {PARENT_HINT: spawner}
        before = self._contexts.get(session.name if place[1] or spawner is None else spawner, [])
        prompt = [*before, *turn.added] if turn.context is None else list(turn.context)
        name = f"{session.name}/{place[1]}"
        self.engine.add_request(name, {"prompt_token_ids": prompt}, parameters, **more)
        self._running[name] = Request(place, prompt, due)

    def _receive(self, output: Any, now: float) -> None:
        request = self._running[output.request_id]
        tokens = output.outputs[0].token_ids
        request.stamps += [now] * (len(tokens) - len(request.stamps))
        request.cached = output.num_cached_tokens if request.cached is None else request.cached
        if not output.finished:
            return
        del self._running[output.request_id]
        prompt, (name, number) = request.prompt, request.place
        self._recorder.add(
            self._sessions[name], number, digest(prompt), len(prompt), request.cached, request.due, now, request.stamps
        )
        self._contexts[name] = prompt + list(tokens)
        self._plan(self._walk.end(request.place, now))
