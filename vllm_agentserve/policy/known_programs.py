"""The programs that load control knows: those that wait to begin or are under way, and those that are gone."""

from collections import OrderedDict
from collections.abc import Container, Iterator
from itertools import islice
from math import inf

from vllm_agentserve.policy.claims import LoadCall, Program, lapsed, longer, presence
from vllm_agentserve.policy.gaps import Returns
from vllm_agentserve.policy.sub_agents import SubAgents
from vllm_agentserve.policy.turn_means import Mean

RETRY_S = 60.0
"""A program that gave up and comes again within this time has been held since it came first: clients retry after a timeout."""
UNTRUE = 0.15
"""Ends that are told are believed while returns after them are at most this share of both."""
LOOK_AHEAD = 4
"""Programs that are away and looked at again whenever a call comes."""
TENANTS_KEPT = 128
"""Tenants of whose sub-agents something is remembered."""
PROGRAMS_KEPT = 65_536
"""Programs remembered that are gone, and as many that are away."""


class KnownPrograms:
    """Who is under way, who is away, who is gone; and what their returns say of others, in `returns` and `sub_agents`."""

    def __init__(self) -> None:
        self.returns = Returns()
        self.sub_agents = SubAgents()
        """Of programs without a tenant."""
        self._of_tenants: OrderedDict[str, SubAgents] = OrderedDict()
        """Of the others, by tenant, the longest unused first: what one tenant's programs do says nothing of another's."""
        self.live: dict[str, Program] = {}
        """Programs that wait to begin or are under way."""
        self._away: OrderedDict[str, None] = OrderedDict()
        """Those of them without calls."""
        self.gone: OrderedDict[str, Program] = OrderedDict()
        """Those whose claims have lapsed or that are over: one that comes back all the same is known."""
        self._gave_up: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """When calls came that were aborted while they were held, and when that was, by the names of their programs."""
        self._untrue = Mean()
        """1 for a program that came back after its told end, 0 for a told end."""

    def comes(self, name: str, now_s: float, named: bool, tenant: str = "") -> tuple[Program, float]:
        """A call of that program came. Returns the program, and since when it has been waiting for its first call."""
        self._look_again(now_s)
        if name in self.gone:
            self.live[name] = self.gone.pop(name)
            self._returned(self.live[name], now_s, revised=True)
        elif name in self.live and not self.live[name].calls:
            self._returned(self.live[name], now_s, revised=False)
        program = self.live.setdefault(name, Program(name, named, tenant))
        self._away.pop(name, None)
        came_s, gave_up_s = self._gave_up.pop(name, (now_s, -inf))
        return program, came_s if now_s - gave_up_s <= RETRY_S else now_s

    def sub_agents_of(self, program: Program) -> SubAgents:
        """What is known of sub-agents among the programs of its tenant."""
        tenant = program.tenant
        if not tenant:
            return self.sub_agents
        known = self._of_tenants.get(tenant)
        if known is None:
            known = self._of_tenants[tenant] = SubAgents()
        self._of_tenants.move_to_end(tenant)
        if len(self._of_tenants) > TENANTS_KEPT:
            # A client may invent tenants. Those of whom something was learned stay for longer.
            others = (name for name, one in self._of_tenants.items() if name != tenant and not one.learned)
            del self._of_tenants[next(others, next(iter(self._of_tenants)))]
        return known

    def seems_sub_agent(self, program: Program) -> bool:
        """See `SubAgents.seems`. All that are held are asked for again and again: that keeps no tenant for longer."""
        known = self._of_tenants.get(program.tenant) if program.tenant else self.sub_agents
        return known is not None and known.seems(program)

    def _look_again(self, now_s: float) -> None:
        """Whether some of the programs that are away have been so for too long: in turns, so that all are seen."""
        for name in [*islice(self._away, LOOK_AHEAD)]:
            self._away.move_to_end(name)
            if lapsed(self.live[name], self.returns, now_s):
                self.lapse(self.live[name])

    def _returned(self, program: Program, now_s: float, revised: bool) -> None:
        gap = now_s - program.ended_s
        program.own.add(gap)
        if program.over:
            self._untrue.add(1.0)
            program.over = False
        self.returns.returned(program.turn(), program.tool, gap, revised)
        self.sub_agents_of(program).comes_back(program, now_s)

    def ended(self, program: Program, now_s: float) -> None:
        """A call of the program ended."""
        self.leaves(program)
        if not program.calls:
            self.sub_agents_of(program).ended(program, now_s)

    def leaves(self, program: Program) -> None:
        """A call of the program is no more; without others it is away."""
        if not program.calls:
            self._away[program.name] = None
            if len(self._away) > PROGRAMS_KEPT:
                self.lapse(self.live[next(iter(self._away))])

    def gives_up(self, program: Program, came_s: float, now_s: float) -> None:
        """Its first call was aborted while it was held, since `came_s`."""
        self._gave_up[program.name] = came_s, now_s
        if len(self._gave_up) > PROGRAMS_KEPT:
            self._gave_up.popitem(last=False)

    def never_began(self, program: Program) -> None:
        """A program that is away had no call that counts: it is forgotten."""
        del self.live[program.name]
        self.sub_agents_of(program).forget(program.name)

    def told_over(self, program: Program) -> bool:
        """The client said that a program that is away is over. Returns whether that is believed."""
        program.over = True
        self._untrue.add(0.0)
        if self._untrue.value > UNTRUE:
            return False
        self.lapse(program)
        return True

    def lapse(self, program: Program) -> None:
        """A program that is away is thought to be over."""
        self.gone[program.name] = self.live.pop(program.name)
        del self._away[program.name]
        self.returns.gone(program.turn(), program.tool)
        self.sub_agents_of(program).gone(program)
        if len(self.gone) > PROGRAMS_KEPT:
            self.gone.popitem(last=False)

    def forget(self, name: str) -> bool:
        """A program without calls is over. Returns whether there was one under way."""
        self.gone.pop(name, None)
        if name not in self.live or self.live[name].calls:
            return False
        program = self.live.pop(name)
        self.sub_agents_of(program).gone(program)
        del self._away[name]
        return True

    def nobody_returns(self, now_s: float) -> bool:
        """Whether more likely than not nobody comes back within a mean gap."""
        soon, nobody = self.returns.gaps.mean_s, 1.0
        for program in self.live.values():
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

    def faults(self, known: Container[LoadCall]) -> Iterator[str]:
        """What does not agree of those that are live, `known` being the calls there are."""
        for name, program in self.live.items():
            if not program.calls and not program.turns:
                yield f"the program {name!r} has neither calls nor turns"
            if (name in self._away) == bool(program.calls):
                yield f"the program {name!r} with {len(program.calls)} calls is not where such programs are"
            gone = sum(call not in known or call.over for call in program.calls)
            if gone:
                yield f"the program {name!r} has {gone} calls that are gone"
