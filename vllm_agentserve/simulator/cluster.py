"""Several engines under one clock, behind the same `Placement` that the router asks.

The router knows of engines what they report, twice a second. Conversations run in a closed loop: a turn comes when the answer
before is complete and its tool has ended. An engine that fails loses its KV and its calls; a second later the router knows, and
sends those calls again.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Any

from vllm_agentserve.policy.placement import EngineLoad, Placement
from vllm_agentserve.simulator.cluster_engine import ClusterEngine, Job, Tier
from vllm_agentserve.simulator.handover import Choice, Link, TurnPredictor
from vllm_agentserve.simulator.pressure import Agent

REPORT_S = 0.5
DETECTED_S = 1.0
"""After so long the router knows that an engine has failed."""
HANDOVER_TOKENS = 2048
"""First prompts from this length on are computed on a prefiller, if there is one."""


@dataclass(frozen=True)
class Failure:
    """The engine of that number fails, and is back with an empty KV cache."""

    engine: int
    fails_s: float
    back_s: float


@dataclass(slots=True)
class Talk:
    """A conversation on its way."""

    agent: Agent
    turn: int = 0
    context: int = 0
    tools_s: float = 0.0
    came_s: float = 0.0
    """When its call came."""
    engine: str = ""
    """Which engine answers it, or answered the one before."""

    @property
    def prompt(self) -> int:
        return self.context + self.agent.turns[self.turn].added


@dataclass
class Served:
    """What a run gave.

    Args:
        first_s: by conversation, from its first call to the first token of its last answer, without its tools.
        turns_s: of every turn, the time to its first token.
        answers_s: of every turn, the time to the end of its answer.
        whole_s: by conversation, from its first call to the end of its last answer, without its tools.
        ends_s: when the last answer was complete.
        turns: answered by each engine.
        reasons: decisions by reason.
        moves: pins that moved.
        changes: turns that went to another engine than the one before.
        transfers: prompts whose KV was moved, and their tokens.
    """

    first_s: dict[str, float] = field(default_factory=dict)
    turns_s: list[float] = field(default_factory=list)
    answers_s: list[float] = field(default_factory=list)
    whole_s: dict[str, float] = field(default_factory=dict)
    ends_s: float = 0.0
    turns: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    moves: int = 0
    changes: int = 0
    transfers: int = 0
    transferred_tokens: int = 0


class Cluster:
    """Engines, a router, and the conversations that they serve.

    Args:
        tiers: of each engine.
        placement: asked for every call, or only of the engines that answer.
        prefillers: so many engines, the first, only compute prompts.
        every_turn: whether they compute the prompts of all turns, not only long ones of first turns.
        per_turn: whether a `TurnPredictor` decides instead of the placement.
        link: between engines.
        failures: of engines.
        told: whether clients say when a conversation is over.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        placement: Placement,
        *,
        prefillers: int = 0,
        every_turn: bool = False,
        per_turn: bool = False,
        link: Link | None = None,
        failures: Sequence[Failure] = (),
        told: bool = False,
    ) -> None:
        self.engines = [ClusterEngine(f"engine-{number:02}", tier) for number, tier in enumerate(tiers)]
        self._by_name = {engine.name: engine for engine in self.engines}
        self._prefillers = self.engines[:prefillers]
        self._decoders = self.engines[prefillers:]
        self.placement = placement
        self._to_prefill = Placement("least-loaded")
        self._link = link or Link()
        self._link_free_s = dict.fromkeys(self._by_name, 0.0)
        self._up = set(self._by_name)
        """Engines that live."""
        self._known = set(self._by_name)
        """Engines that live as far as the router knows."""
        self._predictor = None
        if per_turn:
            self._predictor = TurnPredictor(self._decoders, self._prefillers, self._link, self._known)
        self._every_turn = every_turn
        self._told = told
        self._events: list[tuple[float, int, str, Any]] = []
        self._numbers = count()
        self._versions = dict.fromkeys(self._by_name, 0)
        self._talks: dict[str, Talk] = {}
        self._lost: list[str] = []
        self._left = 0
        self.now_s = 0.0
        self.served = Served()
        for failure in failures:
            engine = self.engines[failure.engine]
            self._plan(failure.fails_s, "fails", engine)
            self._plan(failure.fails_s + DETECTED_S, "known", None)
            self._plan(failure.back_s, "back", engine)

    def run(self, agents: Sequence[Agent]) -> Served:
        """Runs all conversations to their end."""
        self._tell_routers()
        self._talks = {agent.name: Talk(agent) for agent in agents}
        self._left = len(agents)
        for agent in agents:
            self._plan(agent.arrival_s, "turn", agent.name)
        self._plan(0.0, "report", None)
        while self._left:
            self.now_s, _, kind, what = heapq.heappop(self._events)
            match kind:
                case "work":
                    self._work(*what)
                case "turn":
                    talk = self._talks[what]
                    talk.came_s = self.now_s
                    self._send(talk)
                case "moved":
                    self._submit(*what)
                case "report":
                    self._report()
                case "fails":
                    self._up.remove(what.name)
                    self._lost += [job.name for job in what.fail()]
                    self._versions[what.name] = what.version
                case "known":
                    self._tell_routers()
                    lost, self._lost = self._lost, []
                    for name in lost:
                        self._again(self._talks[name])
                case "back":
                    self._up.add(what.name)
                    self._tell_routers()
        return self.served

    def joules(self) -> float:
        """Energy of all engines."""
        return sum(engine.joules(self.served.ends_s) for engine in self.engines)

    def _plan(self, when_s: float, kind: str, what: Any) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), kind, what))

    def _tell_routers(self) -> None:
        self._known.clear()
        self._known |= self._up
        self.placement.engines([one.name for one in self._decoders if one.name in self._up], self.now_s)
        self._to_prefill.engines([one.name for one in self._prefillers if one.name in self._up], self.now_s)

    def _report(self) -> None:
        for engine in self.engines:
            if engine.name in self._up:
                load = EngineLoad(engine.running, len(engine.waiting), engine.kv.running, engine.kv.capacity)
                self.placement.report(engine.name, load, self.now_s)
                self._to_prefill.report(engine.name, load, self.now_s)
        self._plan(self.now_s + REPORT_S, "report", None)

    def _send(self, talk: Talk) -> None:
        """A call goes to an engine, or its prompt to a prefiller first."""
        before, choice = talk.engine, self._choose(talk)
        talk.engine = choice.decoder.name
        self.served.changes += before not in ("", talk.engine)
        answer = talk.agent.turns[talk.turn].answer
        if choice.prefiller is None:
            self._submit(choice.decoder, Job(talk.agent.name, talk.turn, talk.prompt, answer, talk.context))
        else:
            ahead = Job(talk.agent.name, talk.turn, talk.prompt, 1, talk.context, handover=True)
            self._submit(choice.prefiller, ahead)

    def _choose(self, talk: Talk) -> Choice:
        if self._predictor is not None:
            return self._predictor.choose(talk.agent.name, talk.prompt)
        decision = self.placement.place(talk.agent.name, talk.prompt, self.now_s)
        self.served.reasons[decision.reason] += 1
        self.served.moves += decision.moved_from is not None
        decoder = self._by_name[decision.engine]
        prefillers = [one for one in self._prefillers if one.name in self._known]
        hands_over = self._every_turn or (decision.reason == "first" and talk.prompt >= HANDOVER_TOKENS)
        if not prefillers or not hands_over:
            return Choice(decoder, None)
        return Choice(decoder, self._by_name[self._to_prefill.place("", talk.prompt, self.now_s).engine])

    def _submit(self, engine: ClusterEngine, job: Job) -> None:
        if engine.name in self._up:
            engine.submit(job, self.now_s)
            self._watch(engine)
        elif engine.name in self._known:
            self._lost.append(job.name)
        else:
            self._again(self._talks[job.name])

    def _again(self, talk: Talk) -> None:
        """A call was lost with its engine."""
        if self._predictor is None:
            self.placement.finished(talk.agent.name, talk.engine, talk.context, self.now_s)
        self._send(talk)

    def _watch(self, engine: ClusterEngine) -> None:
        if engine.version != self._versions[engine.name]:
            self._versions[engine.name] = engine.version
            if engine.until_s < inf:
                self._plan(engine.until_s, "work", (engine, engine.version))

    def _work(self, engine: ClusterEngine, version: int) -> None:
        if version != engine.version:
            return
        for job in engine.finish():
            if job.handover:
                self._hand_over(engine, job)
            else:
                self._ended(job)
        self._watch(engine)

    def _hand_over(self, engine: ClusterEngine, job: Job) -> None:
        """The KV of a prompt moves to the engine that answers."""
        talk = self._talks[job.name]
        self._to_prefill.finished("", engine.name, job.prompt, self.now_s)
        decoder = self._by_name[talk.engine]
        tokens = job.prompt - decoder.kv.cached(job.name)
        self.served.transfers += 1
        self.served.transferred_tokens += tokens
        free_s = max(self.now_s, self._link_free_s[engine.name]) + self._link.seconds(tokens)
        self._link_free_s[engine.name] = free_s
        answer = talk.agent.turns[talk.turn].answer
        moved = Job(job.name, job.turn, job.prompt, answer, talk.context, brought=job.prompt)
        self._plan(free_s + self._link.latency_s, "moved", (decoder, moved))

    def _ended(self, job: Job) -> None:
        talk = self._talks[job.name]
        agent = talk.agent
        talk.context = job.prompt + job.answer
        talk.turn += 1
        self.served.turns_s.append(job.first_s - talk.came_s)
        self.served.answers_s.append(self.now_s - talk.came_s)
        self.served.turns[talk.engine] += 1
        if self._predictor is None:
            self.placement.finished(agent.name, talk.engine, talk.context, self.now_s)
        else:
            self._predictor.learn(job.answer)
        if talk.turn < len(agent.turns):
            gap_s = agent.turns[talk.turn].gap_s
            talk.tools_s += gap_s
            self._plan(self.now_s + gap_s, "turn", agent.name)
            return
        self._left -= 1
        self.served.whole_s[agent.name] = self.now_s - agent.arrival_s - talk.tools_s
        self.served.first_s[agent.name] = job.first_s - agent.arrival_s - talk.tools_s
        self.served.ends_s = self.now_s
        if self._told and self._predictor is None:
            self.placement.ended(agent.name, self.now_s)
