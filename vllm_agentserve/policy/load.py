"""Load control: which programs may begin, so that those under way keep their contexts in the KV cache.

When the contexts of the programs under way do not fit, every turn computes its context again and pushes out somebody else's:
an engine that could give many turns per second gives few. So the first call of a program waits while those under way fill the
cache, as long as that gives more turns per second than letting everybody begin. After an operating system's load control
against thrashing (Denning, 1968).

What is learned, from how much, and how fast it follows:

- Whether and when programs come back: `policy/gaps.py`. Until a return was seen there is none, and nothing is held. One return
  is enough to begin. Where nobody came back, seven returns in a row begin it; where all did, three first calls in a row
  without a return end it.
- Seconds to read a token, decoding time, new tokens and growth of a turn: means over about 32 turns.
- How much of the cache is of use, 0.95 of its size at first, 0.85 to 1.15: each turn whose share of found context differs by
  more than a tenth from the model's moves it by up to 2 %.
- The limit is decided anew four times a second while a first call waits.

Everything is said with the time at which it happened, in seconds of any clock.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import islice
from math import exp, inf
from typing import Literal

from vllm_agentserve.policy.claims import (
    USUAL,
    Begins,
    Claims,
    LoadCall,
    Program,
    claim,
    lapsed,
    longer,
    presence,
    stays,
)
from vllm_agentserve.policy.gaps import Returns
from vllm_agentserve.policy.turn_rate import CLIFF, TurnCost, hit_ratio, turns_per_second

Reason = Literal["fits", "faster without", "model"]
"""Of the limit: there is none because all fit, or because recomputing costs less than idling; or it is the model's."""

MAX_HOLD_S = 480.0
"""Two minutes less than the time after which clients of the OpenAI API give up by default."""
DECIDE_S = 0.25
COUNT_S = 0.1
"""Claims are counted again after so long."""
COUNT_S_PER_PROGRAM = 1e-4
"""And not before so much for each program, since each takes 3 to 4 us of the scheduler's thread."""
COUNTED_FREELY = 64
"""So few are counted again whenever a claim has gone."""
COUNTED_AT_ONCE = 512
"""So many are counted in one step; more of them in parts, so that no step takes long."""
COMES, GOES = 0.9, 0.8
"""A limit comes when it gives so many times the turns per second of none, and goes when it gives no more than so many. With as
many turns per second the last program ends when it would without, and the others earlier; the model says a tenth too little of
limits, since contexts are seldom all at their largest."""
OVERDUE = 1.5
"""A program that has been away for more than so many mean gaps may be over: its context does not make a limit useless."""
FIRST_ROOM, LEAST_ROOM, MOST_ROOM = 0.95, 0.85, 1.15
"""Share of the pool that contexts can fill before they push each other out: at first, and the bounds of what is measured."""
ROOM_STEP = 0.02
ROOM_TOLERANCE = 0.1
FITS = 1.1
"""Programs that will want so many pools at most are not held: they seldom want it all at once."""
SETTLE_S, BURST = 0.3, 0.5
"""Programs that come together are decided on together: the first that might not fit waits so long for the others, while this
share of all programs came within that time."""
CROWDS = (2.0, 4.0)
"""Where there is no limit, it is also asked whether there would be one for so many times as many programs."""
GREW = 1.25
"""That there is no limit is decided again once so many times the programs are known."""
IDLE = 0.6
"""An engine that has had nothing to do for so many mean gaps lets a program begin: those under way may wait for it."""
LARGE = 0.5
"""Programs that want more than this share of the limit do not make smaller ones wait."""
CONTEXT_FADE = 0.9
"""What is left of a program's longest context with each shorter one."""
RETRY_S = 60.0
"""A program that gave up and comes again within this time has been held since it came first: clients retry after a timeout."""
PRESSURES = tuple(step / 10 for step in range(5, 11))
"""Limits that are tried, in pools."""
TURNS_KEPT = 32.0
UNTRUE = 0.15
"""Ends that are told are believed while returns after them are at most this share of both."""
LOOK_AHEAD = 4
"""Programs that are away and looked at again whenever a call comes."""
PROGRAMS_KEPT = 65_536
"""Programs remembered that are gone, and as many that are away."""


class Mean:
    """A weighted mean of what was seen lately."""

    def __init__(self) -> None:
        self._fade = exp(-1 / TURNS_KEPT)
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum = self._sum * self._fade + value * weight
        self._weight = self._weight * self._fade + weight

    @property
    def value(self) -> float:
        """0 where nothing was seen."""
        return self._sum / self._weight if self._weight else 0.0


@dataclass(frozen=True)
class Weighed:
    """What a decision on the limit was made from.

    Args:
        programs: those under way and those that wait.
        limited, without: turns per second with the best limit, and without any.
        turn: of the mean program.
    """

    programs: float
    limited: float
    without: float
    turn: TurnCost


@dataclass(frozen=True)
class LoadReport:
    """What load control does.

    Args:
        limit_tokens: of claims; None where there is no limit.
        claims_tokens: what the programs under way will want at most.
        pool_tokens: size of the KV cache.
        programs: under way.
        held: first calls that are held.
        hit_ratio: of resumed turns, lately.
        room: share of the pool that is of use, as measured.
        begun: first calls that began, by why they might.
    """

    limit_tokens: float | None
    reason: Reason
    claims_tokens: float
    pool_tokens: int
    programs: float
    held: int
    hit_ratio: float
    room: float
    begun: dict[Begins, int]


class LoadControl:
    """Says whether a call may begin. Only a program's first call is ever held.

    Args:
        pool_tokens: size of the KV cache.
        block_tokens: of a KV block; half a block of every context is wasted.
        max_hold_s: nobody is held longer.
    """

    def __init__(self, pool_tokens: int, block_tokens: int = 16, max_hold_s: float = MAX_HOLD_S) -> None:
        self.pool_tokens = max(pool_tokens, 1)
        self.max_hold_s = max_hold_s
        self._block = block_tokens
        self._waste = block_tokens // 2
        self.returns = Returns()
        self._live: dict[str, Program] = {}
        """Programs that wait to begin or are under way."""
        self._away: OrderedDict[str, None] = OrderedDict()
        """Those of them without calls."""
        self._gone: OrderedDict[str, Program] = OrderedDict()
        """Those whose claims have lapsed or that are over: one that comes back all the same is known."""
        self._gave_up: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """When calls came that were aborted while they were held, and when that was, by the names of their programs."""
        self._firsts: dict[LoadCall, None] = {}
        """First calls that may not begin yet, or were not asked for, as they came."""
        self._held = 0
        """How many of them are held."""
        self._passed = 0
        """How many of these let others begin before them."""
        self._untrue = Mean()
        """1 for a program that came back after its told end, 0 for a told end."""
        self._hits = Mean()
        self._parts = Mean()
        """Of the most that a program will want, the share that a resumed call has: contexts grow, and sub-agents have less."""
        self._read_s_per_token = Mean()
        self._decode_s = Mean()
        self._growth = Mean()
        self._new_tokens = Mean()
        self._room = FIRST_ROOM
        self._claims = Claims()
        self._surely = 0.0
        """Tokens of the contexts of those under way that have calls, or have not been away for longer than usual."""
        self._limit = inf
        self._reason: Reason = "fits"
        self._decided_on = 0.0
        """How many programs that was decided on."""
        self.weighed: Weighed | None = None
        """Of the last decision for which it mattered."""
        self._better_if_more = True
        """Whether there would be a limit if many more came."""
        self._came_s: deque[float] = deque()
        """When the first calls came that came within `SETTLE_S`."""
        self._surely_part = 0.0
        """The same of those that have been counted."""
        self._counted_s = self._part_s = self._decided_s = -inf
        self._closed_until_s = self._large_closed_until_s = -inf
        """For those that others do not pass, and for those that they do."""
        self._stale = False
        """Whether claims have gone since they were counted."""
        self._round: Iterator[Program] | None = None
        """Those that are still to be counted; None between two counts."""
        self._alike: dict[tuple[bool, int], tuple[float, float]] = {}
        """Of those that have been counted, by turn: how many, and the sum of their tokens."""
        self._came = Claims()
        """Of those that began since the count did."""
        self._idle_since_s = inf
        """When a held call was first asked for while the engine had nothing else to do, since it last did something."""
        self._begun: Counter[Begins] = Counter()

    # Events.

    def arrive(
        self, name: str, now_s: float, prompt_tokens: int, *, named: bool = True, can_return: bool = True
    ) -> LoadCall:
        """A call came. Returns what the other events are told of.

        Args:
            name: of its program; sub-agents are calls of the program that started them.
            named: whether the client said so; otherwise it was inferred.
            can_return: False for what cannot come back: pooling, or no prefix cache.
        """
        self._look_again(now_s)
        if name in self._gone:
            self._live[name] = self._gone.pop(name)
            self._returned(self._live[name], now_s, revised=True)
        elif name in self._live and not self._live[name].calls:
            self._returned(self._live[name], now_s, revised=False)
        program = self._live.setdefault(name, Program(name, named))
        self._away.pop(name, None)
        came_s, gave_up_s = self._gave_up.pop(name, (now_s, -inf))
        call = LoadCall(program, came_s if now_s - gave_up_s <= RETRY_S else now_s, prompt_tokens, can_return)
        if program.turns or program.begun:
            call.why = "returning"
        elif not can_return:
            call.why = "one-shot"
        else:
            self._firsts[call] = None
            self._lately(now_s)
            self._came_s.append(now_s)
        program.calls[call] = None
        return call

    def _look_again(self, now_s: float) -> None:
        """Whether some of the programs that are away have been so for too long: in turns, so that all are seen."""
        for name in [*islice(self._away, LOOK_AHEAD)]:
            self._away.move_to_end(name)
            if lapsed(self._live[name], self.returns, now_s):
                self._lapse(self._live[name])

    def _returned(self, program: Program, now_s: float, revised: bool) -> None:
        gap = now_s - program.ended_s
        program.own.add(gap)
        if program.over:
            self._untrue.add(1.0)
            program.over = False
        self.returns.returned(program.turn(), program.tool, gap, revised)

    def begin(self, call: LoadCall, now_s: float, cached_tokens: int, *, child: bool = False) -> None:
        """A call is scheduled for the first time, with so many tokens of its prompt found in the prefix cache.

        Args:
            child: whether it is known to be a sub-agent's, whose context may be its own: what it finds says nothing then.
        """
        if call.begun or call.over:
            return
        call.begun = True
        self._idle_since_s = inf
        program = call.program
        self._release(call)
        if program.turns:
            self._resumed(program, now_s, call.prompt_tokens, None if child else cached_tokens)
        # A program whose only call cannot return wants nothing later.
        program.begun |= call.can_return or bool(program.turns)

    def _waits_no_more(self, call: LoadCall) -> bool:
        """Takes a first call out of those that wait; returns whether it was one."""
        if call not in self._firsts:
            return False
        del self._firsts[call]
        self._held -= call.held
        self._passed -= call.passed
        call.held = call.passed = False
        return True

    def _release(self, call: LoadCall) -> None:
        """The program of a first call is under way from now on, even if the call waits for other reasons."""
        if self._waits_no_more(call):
            program = call.program
            if not program.begun:
                newcomer = self._newcomer(program.named, call.prompt_tokens)
                self._claims += newcomer
                self._came += newcomer
                self._surely += newcomer.now
            program.begun = True

    def _resumed(self, program: Program, now_s: float, prompt_tokens: int, cached_tokens: int | None) -> None:
        there = min(program.context, prompt_tokens)
        will = claim(program.wants, self._growth.value, stays(self.returns, program.named, program.turns + 1))
        self._parts.add(there / max(will.most, program.context, 1.0))
        self._new_tokens.add(max(prompt_tokens - program.context, 0))
        if cached_tokens is None:
            return
        found = min(cached_tokens / max(there, 1), 1.0)
        self._hits.add(found)
        # Of a context of no more than a block nothing can be found.
        if self._limit < inf and there > self._block:
            self._count(now_s)
            if there - cached_tokens <= self._block:
                # Only full blocks are found, and the last token of an answer is not in the cache: nothing was pushed out.
                found = 1.0
            error = found - hit_ratio(self._claims.now / (self.pool_tokens * self._room))
            if abs(error) > ROOM_TOLERANCE:
                self._room = min(max(self._room * exp(ROOM_STEP * error), LEAST_ROOM), MOST_ROOM)

    def end(
        self,
        call: LoadCall,
        now_s: float,
        context_tokens: int,
        *,
        read_s: float,
        read_tokens: int,
        decode_s: float,
        last: bool = False,
        tool: str | None = None,
        child: bool = False,
    ) -> None:
        """A call that had begun ended.

        Args:
            context_tokens: prompt and answer.
            read_s: engine time its prompt took.
            read_tokens: tokens of the prompt that were computed, again after a preemption included.
            decode_s: what its decoding would have taken in steps without prompts.
            last: whether the client said that the program ends with it.
            tool: what the program does until it comes back, where that was said.
            child: whether it is known to be a sub-agent's: the context of its parent is still needed.
        """
        if not self._over(call):
            return
        program = call.program
        if not (program.begun or call.can_return):
            if not program.calls:
                del self._live[program.name]
            return
        if program.turns and context_tokens > program.context:
            self._growth.add(context_tokens - program.context)
        program.context = max(program.context, context_tokens)
        program.kept = max(program.kept if child else program.kept * CONTEXT_FADE, context_tokens)
        program.turns += 1
        program.ended_s, program.tool, program.begun = now_s, tool, True
        self._idle_since_s = inf
        if read_tokens:
            self._read_s_per_token.add(read_s / read_tokens, read_tokens)
        self._decode_s.add(decode_s)
        self._open()
        self._leaves(program)
        if last and not program.calls:
            program.over = True
            self._untrue.add(0.0)
            if self._untrue.value <= UNTRUE:
                self._lapse(program)
                self._stale = True

    def _over(self, call: LoadCall) -> bool:
        """A call is no more; returns whether that is new."""
        if call.over:
            return False
        call.over = True
        self._waits_no_more(call)
        del call.program.calls[call]
        return True

    def _leaves(self, program: Program) -> None:
        """A call of the program is no more; without others it is away."""
        if not program.calls:
            self._away[program.name] = None
            if len(self._away) > PROGRAMS_KEPT:
                self._lapse(self._live[next(iter(self._away))])

    def abort(self, call: LoadCall, now_s: float) -> None:
        """A call ended before its answer did, or before it began."""
        held = call.held
        if not self._over(call):
            return
        program = call.program
        program.ended_s = now_s
        if held and program.named:
            self._gave_up[program.name] = call.came_s, now_s
            if len(self._gave_up) > PROGRAMS_KEPT:
                self._gave_up.popitem(last=False)
        if program.calls or program.turns:
            self._leaves(program)
        else:
            del self._live[program.name]
        self._stale = True
        self._open()

    def _open(self) -> None:
        """Something has happened: those that are held may be asked for again."""
        self._closed_until_s = self._large_closed_until_s = -inf

    def forget(self, program: str) -> None:
        """A program without calls is over. One with calls goes on, unknown ones are no matter."""
        self._gone.pop(program, None)
        if program in self._live and not self._live[program].calls:
            del self._live[program], self._away[program]
            self._stale = True
            self._open()

    # Decisions.

    def closed(self, now_s: float) -> bool:
        """Whether asking again is of no use yet: `may_begin` said no, and nothing has happened since."""
        return now_s < self.ask_again_s

    @property
    def ask_again_s(self) -> float:
        """When `may_begin` may say something else even if nothing happens; -inf for now."""
        return self._closed_until_s if self._held > self._passed else self._large_closed_until_s

    def may_begin(self, call: LoadCall, now_s: float, *, idle: bool) -> bool:
        """Whether a call that waits may be scheduled; ask for the held ones in their order.

        A yes is not taken back, and its program counts as under way. A newcomer does not pass those that are held: asked for
        when it comes, it is held too. Only those that want most of the limit are passed, by smaller ones: else one client
        with a huge prompt would make all others wait.

        Args:
            idle: whether the engine has nothing else to do: nothing runs, and nothing that may begin waits.
        """
        why = self._why(call, now_s, idle)
        if why is None:
            self._held += not call.held
            call.held = True
            return False
        if call.why is None:
            self._begun[why] += 1
            call.why = why
        self._release(call)
        return True

    def _why(self, call: LoadCall, now_s: float, idle: bool) -> Begins | None:
        """Why it may begin; None if it is held."""
        program = call.program
        if call.why is not None:
            return call.why
        if program.begun:
            return "returning"
        if now_s - call.came_s >= self.max_hold_s:
            return "bound"
        if self.returns.begins(program.named) <= USUAL:
            return "one-shot"
        if call.passed:
            if now_s < self._large_closed_until_s:
                return None
        elif now_s < self._closed_until_s or (self._held > self._passed and not call.held):
            return None
        self._count(now_s)
        newcomer = self._newcomer(program.named, call.prompt_tokens)
        wanted = (self._claims + newcomer).most
        known = self._claims.programs + len(self._firsts)
        grew = self._reason == "fits" and wanted > FITS * self.pool_tokens
        if grew or (self._limit == inf and known > GREW * self._decided_on):
            self._decided_s = -inf
        self._decide(now_s)
        if self._limit == inf:
            more = self._reason == "fits" or self._lately(now_s) > BURST * known
            unsure = self._better_if_more and more and wanted > self.pool_tokens
            if unsure and self._claims.programs and not idle and now_s - call.came_s < SETTLE_S:
                self._closed_until_s = min(now_s + COUNT_S, call.came_s + SETTLE_S)
                return None
            return "unlimited"
        if not self._claims.programs:
            return "alone"
        large = newcomer.most > LARGE * self._limit
        behind = large and not call.held and self._passed > 0
        if wanted <= self._limit and not behind:
            return "fits"
        if idle and not behind and (self._nobody_came(now_s) or self._nobody_returns(now_s)):
            return "idle"
        self._passed += large - call.passed
        call.passed = large
        if not large:
            self._closed_until_s = now_s + COUNT_S
        elif not behind:
            self._large_closed_until_s = now_s + COUNT_S
        return None

    def _lately(self, now_s: float) -> int:
        """How many first calls came just now."""
        while self._came_s and now_s - self._came_s[0] > SETTLE_S:
            self._came_s.popleft()
        return len(self._came_s)

    def _newcomer(self, named: bool, prompt_tokens: float, programs: int = 1) -> Claims:
        """What so many programs want that begin, with prompts of so many tokens in the mean."""
        return claim(prompt_tokens + self._waste, self._growth.value, stays(self.returns, named, 1), programs)

    def _nobody_came(self, now_s: float) -> bool:
        """Whether the engine has done nothing for a mean gap: those under way may wait for the very calls that are held."""
        self._idle_since_s = min(self._idle_since_s, now_s)
        return now_s - self._idle_since_s >= IDLE * self.returns.gaps.mean_s

    def _nobody_returns(self, now_s: float) -> bool:
        """Whether more likely than not nobody comes back within a mean gap."""
        soon, nobody = self.returns.gaps.mean_s, 1.0
        for program in self._live.values():
            if not program.begun:
                continue
            if program.calls:
                return False
            there = presence(program, self.returns, now_s)
            if there:
                away = now_s - program.ended_s
                then = longer(program, self.returns, away + soon) / longer(program, self.returns, away)
                nobody *= 1 - there * (1 - then)
                if nobody <= 0.5:
                    return False
        return True

    def _count(self, now_s: float) -> None:
        """Adds up the claims of the programs under way; those that have lapsed are gone."""
        if self._round is None:
            programs = len(self._live)
            least = COUNT_S_PER_PROGRAM * programs if programs > COUNTED_FREELY else 0.0
            if now_s - self._counted_s < (least if self._stale else max(COUNT_S, COUNT_S_PER_PROGRAM * programs)):
                return
            self._counted_s, self._stale = now_s, False
            # Those that begin from now on are in `_came`.
            self._round = iter([program for program in self._live.values() if program.begun])
            self._alike, self._came = {}, Claims()
            self._surely_part = 0.0
        elif now_s - self._part_s < COUNT_S_PER_PROGRAM * COUNTED_AT_ONCE:
            return
        self._part_s = now_s
        part = [*islice(self._round, COUNTED_AT_ONCE)]
        growth = self._growth.value
        for program in part:
            if self._live.get(program.name) is not program:
                continue
            if lapsed(program, self.returns, now_s):
                self._lapse(program)
                continue
            there = presence(program, self.returns, now_s)
            tokens = program.wants if program.calls else program.kept + growth
            if program.calls or now_s - program.ended_s <= OVERDUE * self.returns.gaps.mean_s:
                self._surely_part += there * (tokens + self._waste)
            key = program.named, program.turns + 1
            programs_of, sum_of = self._alike.get(key, (0.0, 0.0))
            self._alike[key] = programs_of + there, sum_of + there * (tokens + self._waste)
        if len(part) == COUNTED_AT_ONCE:
            return
        self._claims, self._round = self._came, None
        self._surely = self._surely_part + self._came.now
        for (named, turn), (sharing, tokens) in self._alike.items():
            if sharing:
                self._claims += claim(tokens / sharing, growth, stays(self.returns, named, turn), sharing)

    def _lapse(self, program: Program) -> None:
        self._gone[program.name] = self._live.pop(program.name)
        del self._away[program.name]
        self.returns.gone(program.turn(), program.tool)
        if len(self._gone) > PROGRAMS_KEPT:
            self._gone.popitem(last=False)

    def _decide(self, now_s: float) -> None:
        """Chooses the limit that gives the most turns per second to those under way and those that wait."""
        if now_s - self._decided_s < DECIDE_S:
            return
        self._decided_s = now_s
        self._decided_on = self._claims.programs + len(self._firsts)
        everybody = self._claims
        for named in (True, False):
            prompts = [call.prompt_tokens for call in self._firsts if call.program.named is named]
            if prompts:
                everybody += self._newcomer(named, sum(prompts) / len(prompts), len(prompts))
        pool = self.pool_tokens * self._room
        if everybody.most <= FITS * self.pool_tokens:
            self._limit, self._reason, self._better_if_more = inf, "fits", True
            return
        footprint = everybody.most / everybody.programs
        context = footprint * (self._parts.value or 1.0)
        turn = TurnCost(
            gap_s=self.returns.gaps.mean_s,
            decode_s=self._decode_s.value,
            read_s=self._new_tokens.value * self._read_s_per_token.value,
            again_s=context * self._read_s_per_token.value,
        )
        room = max(pool / context, 1.0)

        def rates(times: float) -> tuple[float, float, float]:
            """Turns per second without a limit and with the best one, and that in pools, if so many times as many came."""
            programs, most = times * everybody.programs, times * everybody.most
            tried = [
                (turns_per_second(pressure * pool / footprint, turn, hit_ratio(pressure)), -pressure)
                for pressure in PRESSURES
                if footprint <= pressure * pool <= most
            ]
            best, pressure = max(tried, default=(0.0, 0.0))
            return turns_per_second(programs, turn, hit_ratio(most / pool), room), best, -pressure

        without, best, pressure = rates(1.0)
        if best and self._surely >= (1 + CLIFF) * pool:
            # Those under way find nothing, whether others are held or not: a limit only helps those that wait, later on.
            under_way = self._claims.programs
            waiting = everybody.programs - under_way
            rate_now = turns_per_second(under_way, turn, 0.0, room)
            rate_later = turns_per_second(min(waiting, pool / footprint), turn, 1.0)
            best = min(best, everybody.programs / (under_way / rate_now + waiting / rate_later)) if waiting else 0.0
        self.weighed = Weighed(everybody.programs, best, without, turn)
        if best > without * (COMES if self._limit == inf else GOES):
            self._limit, self._reason = pressure * pool, "model"
            return
        self._limit, self._reason = inf, "faster without"
        crowds = [rates(times) for times in CROWDS] if self._surely <= pool else []
        self._better_if_more = any(best > without * COMES for without, best, _ in crowds)

    # What is seen.

    @property
    def reason(self) -> Reason:
        """Of the limit, as it was last decided."""
        return self._reason

    def report(self, now_s: float | None = None) -> LoadReport:
        """Claims as they are now; without a time, as they were when somebody was last asked for."""
        if now_s is not None:
            self._count(now_s)
        return LoadReport(
            None if self._limit == inf else self._limit,
            self._reason,
            self._claims.most,
            self.pool_tokens,
            self._claims.programs,
            self._held,
            self._hits.value,
            self._room,
            dict(self._begun),
        )

    def faults(self, known: Container[LoadCall]) -> list[str]:
        """What does not agree, `known` being the calls there are."""
        found = []
        for name, program in self._live.items():
            if not program.calls and not program.turns:
                found.append(f"the program {name!r} has neither calls nor turns")
            if (name in self._away) == bool(program.calls):
                found.append(f"the program {name!r} with {len(program.calls)} calls is not where such programs are")
            gone = sum(call not in known or call.over for call in program.calls)
            if gone:
                found.append(f"the program {name!r} has {gone} calls that are gone")
        for call in self._firsts:
            if call.over or self._live.get(call.program.name) is not call.program:
                found.append(f"a first call of {call.program.name!r} is gone")
        held = sum(call.held for call in self._firsts)
        if held != self._held:
            found.append(f"{self._held} calls are said to be held, and {held} are")
        if sum(call.held and call.passed for call in self._firsts) != self._passed:
            found.append(f"{self._passed} calls are said to let others pass, and that many do not")
        found += [f"the program {name!r} is live and gone" for name in self._gone if name in self._live]
        return found
