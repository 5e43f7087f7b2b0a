"""Sessions against an engine in this process, closed-loop: a turn is due when the answer before and its tool are done."""

import gc
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any

from vllm_agentserve.bench.live import LiveSessions
from vllm_agentserve.bench.recorder import Recorder
from vllm_agentserve.bench.records import Record, digest
from vllm_agentserve.bench.sessions import PARENT_HINT, Session, TurnKey, session_walk, spawning
from vllm_agentserve.bench.walk import DueCall


@dataclass
class RunningTurn:
    """A turn on its way; times in seconds of `perf_counter`."""

    key: TurnKey
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
        live, suffix: as for `replay.Replay`.
    """

    def __init__(
        self,
        engine: Any,
        sessions: Sequence[Session],
        arm: str = "",
        round_number: int = 0,
        told: bool = False,
        live: int | None = None,
        suffix: str = "",
    ) -> None:
        self.engine = engine
        self.told = told
        self.suffix = suffix
        self.seconds = 0.0
        self._recorder = Recorder(arm, round_number, "measured")
        self._sessions = {session.name: session for session in sessions}
        self._spawned_by = {name: key.session for name, key in spawning(sessions).items()}
        self._live = LiveSessions(live, self._spawned_by)
        self._late: dict[str, float] = {}
        """When sessions were due that wait for another one to end."""
        self._walk = session_walk(sessions)
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, TurnKey]] = []
        self._running: dict[str, RunningTurn] = {}
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
                due, _, key = heapq.heappop(self._due)
                if key.number or self._live.begin(key.session):
                    self._send(key, due)
                else:
                    self._late[key.session] = due
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

    def _plan(self, turns: Sequence[DueCall[TurnKey]]) -> None:
        for due in turns:
            heapq.heappush(self._due, (due.at_s, next(self._numbers), due.name))

    def _send(self, key: TurnKey, due: float) -> None:
        from vllm import SamplingParams

        session = self._sessions[key.session]
        turn = session.turns[key.number]
        parameters = SamplingParams(max_tokens=turn.answer, ignore_eos=True, temperature=0.0, detokenize=False)
        spawner = self._spawned_by.get(session.name)
        more: dict[str, Any] = {}
        if self.told:
            more["session_id"] = session.name + self.suffix
            if spawner is not None:
                parameters.extra_args = {PARENT_HINT: spawner + self.suffix}
        before = self._contexts.get(session.name if key.number or spawner is None else spawner, [])
        prompt = [*before, *turn.added] if turn.context is None else list(turn.context)
        name = f"{session.name}/{key.number}"
        self.engine.add_request(name, {"prompt_token_ids": prompt}, parameters, **more)
        self._running[name] = RunningTurn(key, prompt, due)

    def _receive(self, output: Any, now: float) -> None:
        turn = self._running[output.request_id]
        tokens = output.outputs[0].token_ids
        turn.stamps += [now] * (len(tokens) - len(turn.stamps))
        turn.cached = output.num_cached_tokens if turn.cached is None else turn.cached
        if not output.finished:
            return
        del self._running[output.request_id]
        key, prompt = turn.key, turn.prompt
        self._recorder.add(
            self._sessions[key.session],
            key.number,
            digest(prompt),
            len(prompt),
            turn.cached,
            turn.due,
            now,
            turn.stamps,
        )
        self._contexts[key.session] = prompt + list(tokens)
        self._plan(self._walk.end(key, now))
        if key.number == len(self._sessions[key.session].turns) - 1:
            following = self._live.end(key.session)
            if following is not None:
                self._plan([DueCall(TurnKey(following, 0), self._late.pop(following))])
