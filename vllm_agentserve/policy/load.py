"""Load control: how many programs may be under way before their contexts push each other out of the KV cache."""

from collections import OrderedDict
from dataclasses import dataclass, field
from math import exp, inf
from typing import Literal

from vllm_agentserve.policy.gaps import OwnGaps, Returning
from vllm_agentserve.policy.turn_rate import TurnCost, hit_ratio, turns_per_second

Reason = Literal["inert", "model", "measured"]
Verdict = Literal["fits", "returning", "child", "one-shot", "inert", "bound", "idle", "first", "held"]

TURNS_NAMED = 48
AHEAD = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
"""Turns ahead at which the contexts of all programs are added up."""
LAPSE = 0.03
"""A program counts as gone when so few gaps are longer than it has been away."""
LIKELY = 0.6
EVERY_S = 0.25


class Mean:
    """A mean of what was seen lately, by weight."""

    def __init__(self, memory: float) -> None:
        self._fade = exp(-1 / memory)
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum = self._sum * self._fade + value * weight
        self._weight = self._weight * self._fade + weight

    def value(self, default: float = 0.0) -> float:
        return self._sum / self._weight if self._weight else default


@dataclass(slots=True)
class Program:
    told: bool
    calls: set[str] = field(default_factory=set)
    context: int = 0
    turns: int = 0
    last_s: float = 0.0
    tool: str | None = None
    gap_told_s: float | None = None
    over: bool = False
    lapsed: bool = False
    begun: bool = False
    own: OwnGaps = field(default_factory=OwnGaps)

    def turn(self, later: int = 0) -> str:
        """Names its last call, or the one so many after it, for what is learned by turn."""
        return f"{'told' if self.told else 'found'} {min(max(self.turns, 1) + later, TURNS_NAMED)}"


@dataclass(slots=True)
class Call:
    program: str
    came_s: float
    prompt: int
    first: bool
    free: Verdict | None = None
    begun: bool = False
    cached: int = 0


@dataclass(frozen=True)
class Settings:
    max_hold_s: float = 300.0
    stay: float = 1.0
    stay_turns: int = 3
    equal: float = 0.0
    prefer: float = 0.0
    room_least: float = 0.92
    grace: float = 0.8
    margin: float = 0.1
    idle_gaps: float = 1.0
    correct: float = 0.02
    cliff_use: float = 1.0


class LoadControl:
    def __init__(self, pool_tokens: int, settings: Settings | None = None, block_tokens: int = 16) -> None:
        self.pool_tokens = pool_tokens
        self.block_tokens = block_tokens
        self.settings = settings or Settings()
        self.returning = Returning()
        self._programs: OrderedDict[str, Program] = OrderedDict()
        self._calls: dict[str, Call] = {}
        self.limit_tokens = inf
        self.reason: Reason = "inert"
        self.room = 1.0
        """Factor on the pool by which measured hits differ from the model's."""
        self.hits = Mean(32)
        self._seconds_per_token = Mean(32)
        self._decode_s = Mean(32)
        self._growth = Mean(32)
        self._new_tokens = Mean(32)
        self._decided_s = -inf
        self._counted_s = -inf
        self._ahead = [0.0] * len(AHEAD)
        """Tokens of the programs under way, so many turns ahead."""
        self._under_way = 0.0
        self._refused_s = -inf
        self.verdicts: dict[str, int] = {}

    # Events.

    def arrive(
        self,
        call: str,
        program: str,
        now_s: float,
        prompt_tokens: int,
        *,
        told: bool = True,
        parent: str | None = None,
        can_return: bool = True,
    ) -> None:
        known = self._programs.get(program)
        first = known is None
        if known is None:
            known = self._programs[program] = Program(told)
        elif known.turns and not known.calls:
            self._returned(known, now_s)
        known.calls.add(call)
        free: Verdict | None = None
        if not first:
            free = "returning"
        elif parent is not None and parent in self._programs and self._programs[parent].begun:
            free = "child"
        elif not can_return:
            free = "one-shot"
        self._calls[call] = Call(program, now_s, prompt_tokens, first, free)

    def _returned(self, program: Program, now_s: float) -> None:
        gap = now_s - program.last_s
        program.own.add(gap)
        self.returning.returned(program.turn(), program.tool, gap, program.lapsed)
        program.lapsed = program.over = False

    def may_begin(self, call: str, now_s: float, *, idle: bool) -> bool:
        one = self._calls[call]
        verdict = self._verdict(one, now_s, idle)
        if verdict == "held":
            self._refused_s = now_s
        return verdict != "held"

    def _verdict(self, call: Call, now_s: float, idle: bool) -> Verdict:
        if call.begun or call.free is not None:
            return call.free or "returning"
        if now_s - call.came_s >= self.settings.max_hold_s:
            return "bound"
        program = self._programs[call.program]
        if self.returning.probability(program.turn(), None) < LIKELY:
            return "one-shot"
        self._decide(now_s)
        if self.limit_tokens == inf:
            return "inert"
        if not self._under_way:
            return "first"
        if idle and self._nobody_soon(now_s):
            return "idle"
        if self._refused_s == now_s:
            return "held"
        mine = self._newcomer(program.told, call.prompt)
        claims = max(there + more for there, more in zip(self._ahead, mine, strict=True))
        return "fits" if claims <= self.limit_tokens else "held"

    def begin(self, call: str, now_s: float, cached_tokens: int) -> None:
        one = self._calls[call]
        one.begun, one.cached = True, cached_tokens
        program = self._programs[one.program]
        program.begun = True
        if one.first:
            self._counted_s = -inf
        elif program.turns and program.context:
            found = min(cached_tokens / program.context, 1.0)
            self.hits.add(found)
            if self.reason != "inert":
                pressure = self._ahead[0] / (self.pool_tokens * self.room)
                self.room *= exp(self.settings.correct * (found - 0.95 * hit_ratio(pressure)))
                self.room = min(max(self.room, self.settings.room_least), 1.3)
            self._new_tokens.add(one.prompt - program.context)

    def end(
        self,
        call: str,
        now_s: float,
        context_tokens: int,
        *,
        prefill_s: float,
        prefill_tokens: int,
        decode_s: float,
        last: bool = False,
        tool: str | None = None,
        gap_s: float | None = None,
    ) -> None:
        one = self._calls.pop(call)
        program = self._programs[one.program]
        program.calls.discard(call)
        if program.turns:
            self._growth.add(max(context_tokens - program.context, 0))
        program.context = context_tokens
        program.turns += 1
        program.last_s = now_s
        program.tool, program.gap_told_s = tool, gap_s
        if prefill_tokens:
            self._seconds_per_token.add(prefill_s / prefill_tokens, prefill_tokens)
        self._decode_s.add(decode_s)
        if last:
            program.over = True
            self.returning.gone(program.turn(), tool)
            if not program.calls:
                self._programs.pop(one.program)
        self._counted_s = -inf

    def abort(self, call: str, now_s: float) -> None:
        one = self._calls.pop(call, None)
        if one is None:
            return
        program = self._programs[one.program]
        program.calls.discard(call)
        program.last_s = now_s
        if not program.calls and not program.turns:
            self._programs.pop(one.program)
        self._counted_s = -inf

    # Claims.

    def _presence(self, program: Program, now_s: float) -> float:
        """The probability that it comes back."""
        if program.calls:
            return 1.0
        if program.over or not program.turns:
            return 0.0
        back = self.returning.probability(program.turn(), program.tool)
        if self.returning.all.estimate(0.5, 1.0) >= LIKELY:
            back = max(back, self.settings.grace)
        away = now_s - program.last_s
        longer = program.own.survival(away, self.returning.survival(program.tool, away))
        if longer < LAPSE and not program.lapsed and self.returning.gaps.samples:
            program.lapsed = True
            self.returning.gone(program.turn(), program.tool)
        return back * longer / (back * longer + 1 - back) if back < 1 else 1.0

    def _count(self, now_s: float) -> None:
        if now_s - self._counted_s < 0.1:
            return
        self._counted_s = now_s
        growth = self._growth.value()
        classes: dict[tuple[bool, int], tuple[float, float]] = {}
        for program in self._programs.values():
            if not program.begun:
                continue
            presence = self._presence(program, now_s)
            if program.calls:
                context = max(program.context, max(self._calls[call].prompt for call in program.calls))
            else:
                context = program.context + growth
            key = program.told, program.turns + 1
            number, tokens = classes.get(key, (0.0, 0.0))
            classes[key] = number + presence, tokens + presence * (context + self.block_tokens // 2)
        self._under_way = sum(number for number, _ in classes.values())
        self._ahead = [0.0] * len(AHEAD)
        for (told, turn), (number, tokens) in classes.items():
            stay = self._stay(told, turn)
            for index, turns in enumerate(AHEAD):
                self._ahead[index] += stay[index] * (tokens + number * turns * growth)

    def _stay(self, told: bool, turn: int) -> list[float]:
        """Probability that a program in that call is still there so many turns later."""
        found, share, at = [], 1.0, 0
        kind = "told" if told else "found"
        for turns in AHEAD:
            while at < turns:
                share *= self.returning.probability(f"{kind} {min(turn + at, TURNS_NAMED)}", None)
                at += 1
            least = self.settings.stay**turns if turns <= self.settings.stay_turns else 0.0
            found.append(max(share, least))
        return found

    def _newcomer(self, told: bool, prompt: int) -> list[float]:
        growth = self._growth.value()
        prompt += self.block_tokens // 2
        return [
            share * (prompt + turns * growth) for share, turns in zip(self._stay(told, 1), AHEAD, strict=True)
        ]

    def _nobody_soon(self, now_s: float) -> bool:
        soon = self.settings.idle_gaps * (self.returning.gaps.mean_s or 0.0)
        nobody = 1.0
        for program in self._programs.values():
            if not program.begun:
                continue
            if program.calls:
                return False
            presence = self._presence(program, now_s)
            away = now_s - program.last_s
            now = program.own.survival(away, self.returning.survival(program.tool, away))
            then = program.own.survival(away + soon, self.returning.survival(program.tool, away + soon))
            nobody *= 1 - presence * (1 - then / now)
        return nobody > 0.5

    # The limit.

    def _decide(self, now_s: float) -> None:
        self._count(now_s)
        if now_s - self._decided_s < EVERY_S:
            return
        self._decided_s = now_s
        waiting = [call for call in self._calls.values() if call.first and not call.begun]
        ahead = list(self._ahead)
        stays = {told: self._stay(told, 1) for told in (True, False)}
        growth = self._growth.value()
        for call in waiting:
            for index, share in enumerate(stays[self._programs[call.program].told]):
                ahead[index] += share * (call.prompt + AHEAD[index] * growth)
        tokens = max(ahead)
        programs = self._under_way + len(waiting)
        pool = self.pool_tokens * self.room
        if tokens <= pool or programs < 1:
            self.limit_tokens, self.reason = inf, "inert"
            return
        footprint = tokens / programs
        turn = TurnCost(
            gap_s=self.returning.gaps.mean_s or 0.0,
            decode_s=self._decode_s.value(),
            read_s=self._new_tokens.value() * self._seconds_per_token.value(),
            again_s=footprint * self._seconds_per_token.value(),
        )
        everybody = turns_per_second(programs, turn, hit_ratio(tokens / pool))
        tries = []
        for step in range(5, 21):
            tried = step / 10
            count = max(tried * pool / footprint, 1.0)
            if count > programs:
                break
            tries.append((tried, turns_per_second(count, turn, hit_ratio(tried))))
        best = max((rate for _, rate in tries), default=0.0)
        pressure = next((tried for tried, rate in tries if rate >= best * (1 - self.settings.equal)), 0.0)
        margin = self.settings.margin if self.limit_tokens == inf else -self.settings.margin
        if best > everybody * (1 + margin - self.settings.prefer):
            self.limit_tokens, self.reason = max(pressure * pool, footprint), "model"
        else:
            self.limit_tokens, self.reason = inf, "inert"
