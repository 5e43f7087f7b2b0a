"""The limit of load control: how much the programs under way may want of the KV cache, if there is a limit at all."""

from dataclasses import dataclass
from math import exp, inf
from typing import Literal

from vllm_agentserve.policy.claims import Claims
from vllm_agentserve.policy.limit_check import LimitCheck
from vllm_agentserve.policy.tier import Tier, UnmeasuredTier
from vllm_agentserve.policy.turn_means import TurnMeans
from vllm_agentserve.policy.turn_rate import CLIFF, Forecast, TurnCost, hit_ratio, turns_per_second

Reason = Literal["fits", "faster without", "model"]
"""Of the limit: there is none because all fit, or because recomputing costs less than idling; or it is the model's."""

DECIDE_S = 0.25
COMES, GOES = 0.9, 0.85
"""A limit comes when it gives so many times the turns per second of none, and goes when it gives no more than so many. With as
many turns per second the last program ends when it would without, and the others earlier; the model says a tenth too little of
limits, since contexts are seldom all at their largest."""
FIRST_ROOM, LEAST_ROOM, MOST_ROOM = 0.95, 0.85, 1.15
"""Share of the pool that contexts can fill before they push each other out: at first, and the bounds of what is measured."""
ROOM_STEP = 0.02
ROOM_TOLERANCE = 0.1
FITS = 1.1
"""Programs that will want so many pools at most are not held: they seldom want it all at once."""
CROWDS = (2.0, 4.0)
"""Where there is no limit, it is also asked whether there would be one for so many times as many programs."""
GREW = 1.25
"""That there is no limit is decided again once so many times the programs are known."""

CHEAP = 0.5
"""Contexts come back cheaply from host memory if that takes no more than this share of the time to compute them again."""
UNMEASURED = 0.1
"""That share while it is not known."""


class Room:
    """How much of the KV cache is of use, as measured, and of the host memory behind it.

    Args:
        pool_tokens: size of the KV cache.
        host: the memory behind it. It has copies of what is in the cache too, so that both keep as much as the larger of them.
    """

    def __init__(self, pool_tokens: int, host: Tier | None = None) -> None:
        self.pool_tokens = max(pool_tokens, 1)
        self.tier: Tier = host or UnmeasuredTier()
        self.share = FIRST_ROOM

    @property
    def kept_tokens(self) -> int:
        """Tokens that are in the cache or come back from host memory, at most."""
        return max(self.pool_tokens, self.tier.host_tokens)

    @property
    def tokens(self) -> float:
        """Of contexts, before they push each other out."""
        return self.pool_tokens * self.share

    def correct(self, found: float, claims_tokens: float) -> None:
        """A call found that share of its context, in the cache or in host memory, while the programs under way wanted so much."""
        error = found - hit_ratio(claims_tokens / (self.kept_tokens * self.share))
        if abs(error) > ROOM_TOLERANCE:
            self.share = min(max(self.share * exp(ROOM_STEP * error), LEAST_ROOM), MOST_ROOM)


@dataclass(frozen=True)
class Demand:
    """Whom a limit is decided for.

    Args:
        under_way: claims of the programs under way.
        surely: tokens of their contexts that are still needed for sure.
        waiting: first calls that wait.
        everybody: claims of both.
    """

    under_way: Claims
    surely: float
    waiting: int
    everybody: Claims

    @property
    def programs(self) -> float:
        return self.under_way.programs + self.waiting


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


class Limit:
    """Decides, at most four times a second, on the limit that gives the most turns per second.

    Args:
        room: of the KV cache.
        turns: what they were like lately.
    """

    def __init__(self, room: Room, turns: TurnMeans) -> None:
        self._room = room
        self._turns = turns
        self.tokens = inf
        """Of claims; infinite where there is none."""
        self.reason: Reason = "fits"
        self.weighed: Weighed | None = None
        """Of the last decision for which it mattered."""
        self.better_if_more = True
        """Whether there would be a limit if many more came."""
        self.check = LimitCheck()
        self._restores = True
        """Whether contexts come back cheaply from host memory."""
        self._decided_s = -inf
        self._decided_on = 0.0
        """How many programs that was decided on."""

    @property
    def none(self) -> bool:
        return self.tokens == inf

    @property
    def fitting_tokens(self) -> int:
        """Tokens of contexts that nobody needs to wait for: they are in the cache, or come back cheaply."""
        return self._room.kept_tokens if self._restores else self._room.pool_tokens

    def due(self, now_s: float, wanted: float, programs: float) -> bool:
        """Whether it is to be decided again, where so many programs are known that will want so many tokens."""
        grew = self.reason == "fits" and wanted > FITS * self.fitting_tokens
        if grew or (self.none and programs > GREW * self._decided_on):
            self._decided_s = -inf
        return now_s - self._decided_s >= DECIDE_S

    def decide(self, now_s: float, demand: Demand, gap_s: float) -> None:
        """Chooses it for these programs, which are away for `gap_s` between two calls."""
        self._decided_s = now_s
        self._decided_on = demand.programs
        everybody = demand.everybody
        forecast = self._forecast(everybody, gap_s)
        self._restores = forecast.turn.restore_s <= CHEAP * forecast.turn.again_s
        if everybody.most <= FITS * self.fitting_tokens:
            self.tokens, self.reason, self.better_if_more = inf, "fits", True
            return
        without, (best, limit) = forecast.without(), forecast.limited()
        if not self.none and best:
            self.check.expects(now_s, best, without, gap_s)
        best *= self.check.share(now_s)
        if best and demand.surely >= (1 + CLIFF) * forecast.kept:
            best = min(best, self._later(forecast, demand))
        self.weighed = Weighed(everybody.programs, best, without, forecast.turn)
        if best > without * (COMES if self.none else GOES):
            self.tokens, self.reason = limit, "model"
            return
        self.tokens, self.reason = inf, "faster without"
        crowds = CROWDS if demand.surely <= forecast.kept else ()
        gives = self.check.share(now_s)
        self.better_if_more = any(
            forecast.limited(times)[0] * gives > forecast.without(times) * COMES for times in crowds
        )

    def _forecast(self, everybody: Claims, gap_s: float) -> Forecast:
        turns, room = self._turns, self._room
        context = max(everybody.most / everybody.programs * (turns.parts.value or 1.0), 1.0)
        again_s = context * turns.again_s_per_token
        restore_ms = room.tier.restore_ms(round(context)) if room.tier.host_tokens else 0.0
        turn = TurnCost(
            gap_s=gap_s,
            decode_s=turns.decode_s.value,
            beside_s=turns.beside_s.value,
            read_s=turns.read_s.value or turns.new_tokens.value * turns.read_s_per_token.value,
            again_s=again_s,
            restore_s=UNMEASURED * again_s if restore_ms is None else restore_ms / 1000,
        )
        pool = room.tokens
        kept = room.kept_tokens * room.share
        return Forecast(everybody.programs, everybody.likely, pool, kept, turn, max(pool / context, 1.0))

    def _later(self, forecast: Forecast, demand: Demand) -> float:
        """Turns per second with a limit where those under way find nothing, whether others are held or not: it only helps those
        that wait, later on."""
        under_way = demand.under_way.programs
        waiting = demand.everybody.programs - under_way
        if not waiting:
            return 0.0
        rate_now = turns_per_second(under_way, forecast.turn, 0.0, forecast.room)
        rate_later = turns_per_second(min(waiting, forecast.pool / forecast.footprint), forecast.turn, 1.0)
        return demand.everybody.programs / (under_way / rate_now + waiting / rate_later)
