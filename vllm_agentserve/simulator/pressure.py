"""An engine with a KV cache that may be too small, under agents that come back: what load control is tried on.

Steps are vLLM's: running requests first, then waiting ones in order of arrival while slots, tokens and blocks are left; a
running request that finds no block takes the place of the one that was admitted last. What a step takes is given. Whether a
program's first call may begin is asked of the load control, the same object the scheduler asks.
"""

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.policy.claims import LoadCall, Program
from vllm_agentserve.policy.load import LoadControl
from vllm_agentserve.policy.program import Beginnings
from vllm_agentserve.policy.space import Space
from vllm_agentserve.simulator.host_blocks import NO_HOST, Filling, HostBlocks, HostLink
from vllm_agentserve.simulator.kv_blocks import KvBlocks

Ends = Literal["told", "untold", "untrue"]
BYPASS_STEPS, RESUME_TOKENS = 64, 1024
"""Of the order that has resume prefills first; the defaults of `config.py`."""
POLL_S = 0.05
"""Longest time between two questions whether a held call may begin."""


@dataclass(frozen=True)
class Turn:
    """One call: tokens added to the context, tokens of the answer, and seconds since the answer before."""

    added: int
    answer: int
    gap_s: float = 0.0
    children: tuple["Agent", ...] = ()
    """Sub-agents that are started with the end of this call; the next turn waits for all of them, then for its gap."""


@dataclass(frozen=True)
class Agent:
    """A program.

    Args:
        name: unique.
        arrival_s: of its first call; of a sub-agent's, after the call that starts it.
        turns: its calls, one after the other.
        shared: what the first tokens are: agents of the same name share them.
        shared_tokens: how many tokens they share.
        told: whether the client gives a session id.
        critical: whether it says that its calls are critical.
    """

    name: str
    arrival_s: float
    turns: tuple[Turn, ...]
    shared: str = ""
    shared_tokens: int = 0
    told: bool = True
    critical: bool = False


class FixedLimit:
    """At most so many programs under way, whose ends are known: the best of these is what load control is held against.

    It has those methods of `LoadControl` that an engine calls.

    Args:
        programs: None for no limit, as in stock vLLM.
        turns: of each program by name, 1 for one-shot calls, which never wait.
    """

    def __init__(self, programs: int | None = None, turns: dict[str, int] | None = None) -> None:
        self._limit = programs
        self._left = dict(turns or {})
        self._begun: set[str] = set()

    def arrive(self, name: str, now_s: float, prompt_tokens: int, *, named: bool = True, **more: Any) -> LoadCall:
        return LoadCall(Program(name, named), now_s, prompt_tokens)

    def may_begin(self, call: LoadCall, now_s: float, *, idle: bool) -> bool:
        if self._limit is None:
            return True
        program = call.program.name
        return program in self._begun or self._left[program] == 1 or len(self._begun) < self._limit

    def closed(self, now_s: float) -> bool:
        return False

    def begin(self, call: LoadCall, now_s: float, cached_tokens: int, *, child: bool = False) -> None:
        program = call.program.name
        if self._left.get(program, 1) > 1:
            self._begun.add(program)

    def end(self, call: LoadCall, now_s: float, context_tokens: int, **more: Any) -> None:
        program = call.program.name
        if program in self._left:
            self._left[program] -= 1
            if not self._left[program]:
                self._begun.discard(program)


Gate = LoadControl | FixedLimit
"""What an engine tells of calls, and asks of first ones."""


@dataclass(slots=True)
class Run:
    """An agent on its way."""

    agent: Agent
    turn: int = 0
    context: int = 0
    came_s: float = 0.0
    keys: list[Hashable] = field(default_factory=list)
    parent: "Run | None" = None
    pending: int = 0
    """Sub-agents that have not ended."""

    @property
    def program(self) -> str:
        """The agent's own name, or that of the one that started it and those before."""
        return self.agent.name if self.parent is None else self.parent.program


@dataclass(slots=True)
class Request:
    run: Run
    load: LoadCall
    number: int
    first: bool
    prompt: int
    answer: int
    computed: int = 0
    done: int = 0
    """Tokens of the answer."""
    filled: int = 0
    blocks: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0
    prefill_tokens: int = 0
    began: bool = False
    came_s: float = 0.0
    waited: int = 0
    """Steps."""
    age: int = 0
    """Number of its program, in the order in which programs began."""
    restored: int = 0
    """Blocks that come back from host memory, or have come back since it was last admitted."""
    hosted: Filling = field(default_factory=lambda: Filling(""))

    @property
    def critical(self) -> bool:
        return self.run.agent.critical

    @property
    def needs(self) -> int:
        """Tokens that have to be computed before the next one is sampled."""
        return self.prompt + self.done - self.computed


@dataclass
class Outcome:
    """What a run gave.

    Args:
        sessions: by agent: seconds from its arrival to the end of its last call.
        ended_s: when the last call ended.
        turns: calls that ended.
        found, sought: tokens found of contexts that came back, and tokens these contexts had.
        restored: tokens that came from host memory.
        held_s: seconds first calls waited before they began.
    """

    sessions: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    ended_s: float = 0.0
    turns: int = 0
    found: int = 0
    sought: int = 0
    restored: int = 0
    preempted: int = 0
    held_s: list[float] = field(default_factory=list)

    @property
    def hit_ratio(self) -> float:
        return self.found / self.sought if self.sought else 1.0


class PressureEngine:
    """One engine.

    Args:
        blocks: its KV cache.
        cost: of its steps.
        load: decides whether first calls may begin.
        slots: sequences at once.
        step_tokens: tokens of a step at most.
        ends: whether the client says which call is a program's last; or says so of every call.
        start_s: when the clock begins.
        resume_first: whether waiting calls whose contexts are cached go before the others, as in `policy/order.py`; in order of
            arrival otherwise, as in stock vLLM.
        beside_kept: whether calls without a cached context wait while others run and only kept blocks are left, for up to
            `BYPASS_STEPS` steps.
        critical_first: whether critical calls go before all others that wait, as in `policy/order.py`.
        space: the reserve of critical calls; none by default.
        host: memory behind the KV cache; none by default.
        host_policy: makes what decides which copies it keeps.
    """

    def __init__(
        self,
        blocks: KvBlocks,
        cost: StepCost,
        load: Gate,
        slots: int = 256,
        step_tokens: int = 2048,
        ends: Ends = "told",
        start_s: float = 0.0,
        resume_first: bool = False,
        beside_kept: bool = False,
        critical_first: bool = False,
        space: Space | None = None,
        host: HostLink = NO_HOST,
        host_policy: Callable[[HostLink, int], HostBlocks] = HostBlocks,
    ) -> None:
        self._blocks = blocks
        self._retention = blocks.retention
        self._cost = cost
        self._load = load
        self._slots = slots
        self._step_tokens = step_tokens
        self._ends = ends
        self._resume_first = resume_first
        self._beside_kept = beside_kept
        self._critical_first = critical_first
        self._space = Space(blocks.capacity, 0.0) if space is None else space
        self._reserved = 0
        self._host = host_policy(host, blocks.tokens)
        self.now_s = start_s
        self._numbers = count()
        self._beginnings = Beginnings()
        self._events: list[tuple[float, int, Run]] = []
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._loading: list[tuple[float, int, Request]] = []
        """Calls whose blocks come back from host memory, and when they are there."""
        self._held = False
        self.outcome = Outcome()

    def run(self, agents: Sequence[Agent]) -> Outcome:
        """Runs all agents to their end. Arrivals are counted from the clock as it stands."""
        self.outcome = Outcome()
        for agent in agents:
            self._start(agent, self.now_s + agent.arrival_s, None)
        while self._events or self._waiting or self._running or self._loading:
            self._arrivals()
            self._restored()
            chunks = self._schedule()
            if chunks:
                self._step(chunks)
            elif self._events or self._waiting or self._loading:
                due = self._next_s(self.now_s + POLL_S)
                self.now_s = max(min(due, self.now_s + POLL_S) if self._waiting else due, self.now_s)
        self.outcome.ended_s = self.now_s
        return self.outcome

    def _next_s(self, otherwise: float) -> float:
        """When the next call comes, or the next blocks are back."""
        return min((events[0][0] for events in (self._events, self._loading) if events), default=otherwise)

    def _start(self, agent: Agent, when_s: float, parent: Run | None) -> None:
        run = Run(agent, came_s=when_s, parent=parent)
        heapq.heappush(self._events, (when_s, next(self._numbers), run))

    def _arrivals(self) -> None:
        if self._retention is not None:
            for name in self._retention.expire(self.now_s):
                self._blocks.give_up(name)
        while self._events and self._events[0][0] <= self.now_s:
            when, number, run = heapq.heappop(self._events)
            agent, turn = run.agent, run.agent.turns[run.turn]
            prompt = run.context + turn.added
            first = self._critical_first and agent.critical
            load = self._load.arrive(run.program, when, prompt, named=agent.told, ahead=first)
            if self._retention is not None:
                self._retention.arrive(agent.name, when, named=agent.told, critical=agent.critical)
            request = Request(run, load, number, not run.turn, prompt, turn.answer)
            request.came_s, request.age = when, self._beginnings.number(run.program)
            request.hosted = Filling(agent.name, agent.told)
            self._host.arrive(request.hosted, when)
            self._waiting.append(request)

    def _keys(self, request: Request, tokens: int) -> list[Hashable]:
        """Keys of the full blocks of the first `tokens` of a request's context."""
        size, agent, keys = self._blocks.tokens, request.run.agent, request.run.keys
        while len(keys) < tokens // size:
            shared = (len(keys) + 1) * size <= agent.shared_tokens
            keys.append((agent.shared if shared else agent.name, len(keys)))
        return keys[: tokens // size]

    def _schedule(self) -> list[tuple[Request, int]]:
        """What vLLM's scheduler gives to whom in the next step: request and tokens."""
        budget, chunks = self._step_tokens, list[tuple[Request, int]]()
        preempted = False
        index = 0
        while index < len(self._running) and budget:
            request = self._running[index]
            tokens = min(request.needs, budget)
            while not self._grow(request, tokens):
                victim = self._running.pop()
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            else:
                chunks.append((request, tokens))
                budget -= tokens
                index += 1
                continue
            break
        self._held = False
        if preempted:
            return chunks
        if self._resume_first and len(self._waiting) > 1:
            self._sort()
        self._reserved = self._reserve()
        skipped: list[Request] = []
        idle = not self._running and not self._loading
        closed = self._load.closed(self.now_s)
        while self._waiting and budget and len(self._running) < self._slots:
            request = self._waiting[0]
            if request.first and not request.began:
                if closed:
                    skipped.append(self._waiting.popleft())
                    continue
                others = idle and any(not one.first or one.began for one in self._waiting)
                if not self._load.may_begin(request.load, self.now_s, idle=idle and not self._running and not others):
                    skipped.append(self._waiting.popleft())
                    continue
            first_chunk = self._admit(request, budget)
            if first_chunk is None:
                break
            self._waiting.popleft()
            if not first_chunk:
                idle = False
                continue
            self._running.append(request)
            chunks.append((request, first_chunk))
            budget -= first_chunk
        self._held = bool(skipped)
        self._waiting.extendleft(reversed(skipped))
        return chunks

    def _sort(self) -> None:
        """Calls that hold blocks, preempted ones, those that waited for too long, resume prefills with the shortest first, the
        others by the age of their programs."""
        size = self._blocks.tokens

        def key(request: Request) -> tuple[int, float, int]:
            if request.blocks:
                # Others may be waiting for its blocks.
                return -1, request.number, 0
            if request.began:
                return 0, request.number, 0
            length = request.prompt + request.done
            left = length - self._blocks.hits(self._keys(request, length - 1)) * size
            if request.waited >= BYPASS_STEPS:
                return 1, request.number, 0
            later = 2 * (self._critical_first and not request.critical)
            if left < length and left <= RESUME_TOKENS:
                return 2 + later, left, request.number
            return 3 + later, request.age, request.number

        ordered = sorted(self._waiting, key=key)
        for request in ordered:
            request.waited += 1
        self._waiting = deque(ordered)

    def _reserve(self) -> int:
        """Free blocks that calls which are not critical may not have."""
        kept = 0 if self._retention is None else self._retention.critical_blocks
        critical = [one for one in (*self._running, *self._waiting) if one.critical]
        if self._retention is None or not (kept or critical):
            return 0
        away = self._retention.away_blocks({one.run.agent.name for one in self._running}, None, critical=True)
        self._space.adapt(self.now_s, self._blocks.capacity - self._blocks.free + away)
        return self._space.reserved(sum(len(one.blocks) for one in critical))

    def _grow(self, request: Request, tokens: int) -> bool:
        missing = -(-(request.computed + tokens) // self._blocks.tokens) - len(request.blocks)
        if missing > self._blocks.free:
            return False
        if missing > 0:
            request.blocks += self._blocks.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        self._blocks.release(request.blocks)
        request.blocks, request.computed, request.filled, request.restored = [], 0, 0, 0
        self._waiting.appendleft(request)
        self.outcome.preempted += 1

    def _admit(self, request: Request, budget: int) -> int | None:
        """Tokens of its first chunk; None where its prompt has no room, 0 where it waits for blocks from host memory."""
        if not request.blocks:
            length = request.prompt + request.done
            keys = self._keys(request, length - 1)
            hits = self._blocks.hits(keys)
            if self._blocks.needed(keys, hits, length) > self._blocks.free:
                return None
            waits = self._beside_kept and self._running and request.waited < BYPASS_STEPS and 2 * hits < len(keys)
            if waits and self._blocks.needed(keys, hits, length) > self._may_have(request):
                return None
            request.blocks = self._blocks.touch(keys[:hits])
            request.computed = hits * self._blocks.tokens
            request.filled = hits
            request.restored = self._host.hits(keys[hits:])
            if request.restored:
                request.hosted.restored(hits, request.restored)
                # With room for the whole prompt: it need not wait for more when these are there.
                self._grow(request, length - request.computed)
                heapq.heappush(
                    self._loading,
                    (self._host.restored_s(request.restored, self.now_s), request.number, request),
                )
                return 0
        tokens = min(request.needs, budget)
        self._grow(request, tokens)
        if not request.began:
            request.began = True
            self._host.admit(request.hosted)
            self._load.begin(request.load, self.now_s, request.computed, child=request.run.parent is not None)
            if request.first:
                self.outcome.held_s.append(self.now_s - request.came_s)
            else:
                self.outcome.found += min(request.computed, request.run.context)
                self.outcome.sought += request.run.context
                self.outcome.restored += request.restored * self._blocks.tokens
        return tokens

    def _may_have(self, request: Request) -> int:
        """Free blocks that a call may have which did not find its context."""
        free, retention = self._blocks.free, self._retention
        if not request.critical:
            return min(self._blocks.ordinary, free - self._reserved)
        if retention is None:
            return free
        running = {one.run.agent.name for one in self._running}
        return free - retention.away_blocks(running, request.run.agent.name, critical=True)

    def _restored(self) -> None:
        """Calls whose blocks have come back go before those that wait."""
        while self._loading and self._loading[0][0] <= self.now_s:
            _, _, request = heapq.heappop(self._loading)
            request.computed += request.restored * self._blocks.tokens
            self._fill(request)
            self._waiting.appendleft(request)

    def _step(self, chunks: Sequence[tuple[Request, int]]) -> None:
        decodes = [request for request, tokens in chunks if tokens == 1 and request.needs == 1 and request.done]
        prompts = [
            (request, tokens) for request, tokens in chunks if not (tokens == 1 and request.needs == 1 and request.done)
        ]
        context = sum(request.computed for request in decodes)
        took = self._cost.step_ms(len(decodes), context, [(tokens, request.computed) for request, tokens in prompts])
        steps = 1
        if not prompts and not (self._waiting and not self._held):
            steps = self._steps_alike(decodes, took)
        self.now_s += took * steps / 1000
        ended = []
        for request, tokens in prompts:
            request.prefill_ms += self._cost.chunk_ms(tokens, request.computed) + self._cost.prefill / len(prompts)
            request.prefill_tokens += tokens
            request.computed += tokens
            if not request.needs:
                request.done += 1
            self._fill(request)
            if request.done >= request.answer and not request.needs - 1:
                ended.append(request)
        for request in decodes:
            if steps > 1:
                self._grow(request, steps)
            request.computed += steps
            request.done += steps
            self._fill(request)
            if request.done >= request.answer:
                ended.append(request)
        if ended:
            self._running = [request for request in self._running if request not in ended]
            for request in ended:
                self._end(request)

    def _steps_alike(self, decodes: Sequence[Request], each_ms: float) -> int:
        """Steps that can be taken together: nothing ends, nothing comes, and there are blocks for all of them."""
        steps = min(request.answer - request.done for request in decodes)
        if self._events or self._loading:
            steps = min(steps, int((self._next_s(self.now_s) - self.now_s) * 1000 / each_ms) + 1)
        if self._held:
            steps = min(steps, int(POLL_S * 1000 / each_ms) + 1)
        size = self._blocks.tokens
        while steps > 1:
            needed = sum(max(-(-(one.computed + steps) // size) - len(one.blocks), 0) for one in decodes)
            if needed <= self._blocks.free:
                return steps
            steps //= 2
        return max(steps, 1)

    def _fill(self, request: Request) -> None:
        full = request.computed // self._blocks.tokens
        if full > request.filled:
            keys = self._keys(request, request.computed)
            for index in range(request.filled, full):
                self._blocks.fill(request.blocks[index], keys[index])
            self._host.fill(request.hosted, keys, request.filled, self.now_s)
            request.filled = full

    def _end(self, request: Request) -> None:
        run = request.run
        agent, turn = run.agent, run.agent.turns[run.turn]
        run.context = request.prompt + request.answer
        run.turn += 1
        last = run.turn == len(agent.turns)
        self._retain(request, last)
        told = last if self._ends == "told" else self._ends == "untrue"
        self._host.end(request.hosted, self._keys(request, request.computed), self.now_s, told)
        self._blocks.release(request.blocks)
        alone_ms = self._cost.decode_ms(1, run.context)
        self._load.end(
            request.load,
            self.now_s,
            run.context,
            read_s=request.prefill_ms / 1000,
            read_tokens=request.prefill_tokens,
            decode_s=request.answer * alone_ms / 1000,
            beside_s=request.answer * (self._cost.decode_ms(2, 2 * run.context) - alone_ms) / 1000,
            whole_s=(self._cost.chunk_ms(run.context, 0) + self._cost.prefill) / 1000,
            last=last and run.parent is None if self._ends == "told" else self._ends == "untrue",
            child=run.parent is not None,
        )
        self.outcome.turns += 1
        for child in turn.children:
            run.pending += 1
            self._start(child, self.now_s + child.arrival_s, run)
        if last:
            self.outcome.sessions[agent.name] = self.now_s - run.came_s
            self.outcome.ends[agent.name] = self.now_s
            if run.parent is not None:
                run.parent.pending -= 1
                if not run.parent.pending:
                    self._next(run.parent)
        elif not run.pending:
            self._next(run)

    def _retain(self, request: Request, last: bool) -> None:
        """Whether the blocks of a call that ended are kept."""
        if self._retention is None:
            return
        name, blocks = request.run.agent.name, self._blocks
        told = last and self._ends == "told" if self._ends != "untrue" else True
        keeps, gone = self._retention.end(name, self.now_s, blocks.own(name, request.blocks), last=told)
        for other in gone:
            blocks.give_up(other)
        if keeps:
            blocks.keep(name, request.blocks)
        else:
            blocks.give_up(name)

    def _next(self, run: Run) -> None:
        gap = run.agent.turns[run.turn].gap_s
        heapq.heappush(self._events, (self.now_s + gap, next(self._numbers), run))
