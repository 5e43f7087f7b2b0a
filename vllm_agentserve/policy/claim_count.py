"""The claims of all programs under way, added up: in parts, so that no step takes long."""

from collections.abc import Iterator
from itertools import islice
from math import inf

from vllm_agentserve.policy.claims import Claims, Program, claim, lapsed, presence, stays
from vllm_agentserve.policy.known_programs import KnownPrograms
from vllm_agentserve.policy.turn_means import Mean

COUNT_S = 0.1
"""Claims are counted again after so long."""
COUNT_S_PER_PROGRAM = 1e-4
"""And not before so much for each program, since each takes 3 to 4 us of the scheduler's thread."""
COUNTED_FREELY = 64
"""So few are counted again whenever a claim has gone."""
COUNTED_AT_ONCE = 512
"""So many are counted in one step; more of them in parts, so that no step takes long."""
OVERDUE = 1.5
"""A program that has been away for more than so many mean gaps may be over: its context does not make a limit useless."""


class ClaimCount:
    """What the programs under way will want.

    Args:
        programs: whose.
        growth: tokens by which contexts grow in a turn.
        waste_tokens: of the last block of a context, in the mean.
    """

    def __init__(self, programs: KnownPrograms, growth: Mean, waste_tokens: int) -> None:
        self._programs = programs
        self._growth = growth
        self._waste = waste_tokens
        self.claims = Claims()
        self.surely = 0.0
        """Tokens of the contexts of those under way that have calls, or have not been away for longer than usual."""
        self.stale = False
        """Whether claims have gone since they were counted."""
        self._counted_s = self._part_s = -inf
        self._round: Iterator[Program] | None = None
        """Those that are still to be counted; None between two counts."""
        self._alike: dict[tuple[bool, int], tuple[float, float]] = {}
        """Of those that have been counted, by turn: how many, and the sum of their tokens."""
        self._surely_part = 0.0
        """What `surely` is of those."""
        self._came = Claims()
        """Of those that began since the count did."""

    def newcomer(self, named: bool, prompt_tokens: float, programs: int = 1) -> Claims:
        """What so many programs want that begin, with prompts of so many tokens in the mean."""
        stay = stays(self._programs.returns, named, 1)
        return claim(prompt_tokens + self._waste, self._growth.value, stay, programs)

    def begins(self, program: Program, prompt_tokens: int) -> None:
        """A program is under way from now on."""
        newcomer = self.newcomer(program.named, prompt_tokens)
        self.claims += newcomer
        self._came += newcomer
        self.surely += newcomer.now

    @property
    def counting(self) -> bool:
        """Whether a count has begun that is not complete: it goes on with the next update."""
        return self._round is not None

    def update(self, now_s: float, at_once: bool = False) -> None:
        """Counts again where that is due; programs whose claims have lapsed are gone then.

        Args:
            at_once: in one go, however many they are: nothing else is to be done.
        """
        live, returns, growth = self._programs.live, self._programs.returns, self._growth.value
        # All at once begins anew: the first part of a count that is not complete may be old.
        if self._round is None or at_once:
            programs = len(live)
            least = COUNT_S_PER_PROGRAM * programs if programs > COUNTED_FREELY else 0.0
            wait_s = 0.0 if at_once else least if self.stale else max(COUNT_S, COUNT_S_PER_PROGRAM * programs)
            if now_s - self._counted_s < wait_s:
                return
            self._counted_s, self.stale = now_s, False
            # Those that begin from now on are in `_came`.
            self._round = iter([program for program in live.values() if program.begun])
            self._alike, self._came = {}, Claims()
            self._surely_part = 0.0
        elif now_s - self._part_s < COUNT_S_PER_PROGRAM * COUNTED_AT_ONCE:
            return
        self._part_s = now_s
        part = [*(self._round if at_once else islice(self._round, COUNTED_AT_ONCE))]
        for program in part:
            if live.get(program.name) is not program:
                continue
            if lapsed(program, returns, now_s):
                self._programs.lapse(program)
                continue
            there = presence(program, returns, now_s)
            tokens = program.wants if program.calls else program.kept + growth
            if program.calls or now_s - program.ended_s <= OVERDUE * returns.gaps.mean_s:
                self._surely_part += there * (tokens + self._waste)
            key = program.named, program.turns + 1
            programs_of, sum_of = self._alike.get(key, (0.0, 0.0))
            self._alike[key] = programs_of + there, sum_of + there * (tokens + self._waste)
        if len(part) == COUNTED_AT_ONCE and not at_once:
            return
        self.claims, self._round = self._came, None
        self.surely = self._surely_part + self._came.now
        for (named, turn), (sharing, tokens) in self._alike.items():
            if sharing:
                self.claims += claim(tokens / sharing, growth, stays(returns, named, turn), sharing)
