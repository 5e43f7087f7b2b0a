"""Load control: which programs may begin, so that those under way keep their contexts in the KV cache.

When the contexts of the programs under way do not fit, every turn computes its context again and pushes out somebody else's:
an engine that could give many turns per second gives few. So the first call of a program waits while those under way fill the
cache, as long as that gives more turns per second than letting everybody begin. After an operating system's load control
against thrashing (Denning, 1968).

What is learned, from how much, and how fast it follows:

- Whether and when programs come back: `policy/gaps.py`. Until a return was seen there is none, and nothing is held. One return
  is enough to begin. Where nobody came back, seven returns in a row begin it; where all did, three first calls in a row
  without a return end it.
- Seconds to read a token, decoding time, new tokens and growth of a turn: means over about 32 turns (`policy/turn_means.py`).
- How much of the cache is of use, 0.95 of its size at first, 0.85 to 1.15: each turn whose share of found context differs by
  more than a tenth from the model's moves it by up to 2 %.
- The limit is decided anew four times a second while a first call waits (`policy/load_limit.py`).

`LoadControl` hears of calls, and passes on what it hears:

- `KnownPrograms`: who is under way, away or gone, and what returns say of others; in it `SubAgents`: who seems to be one;
- `TurnMeans`: what turns were like lately;
- `ClaimCount`: what the programs under way will want of the cache;
- `Limit`: how much they may want together, from turns per second (`policy/turn_rate.py`);
- `FirstCalls` and `Burst`: who waits to begin, and who came just now.

Everything is said with the time at which it happened, in seconds of any clock.
"""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from math import inf

from vllm_agentserve.policy.claim_count import COUNT_S, ClaimCount
from vllm_agentserve.policy.claims import USUAL, Begins, LoadCall, Program, claim, stays
from vllm_agentserve.policy.first_calls import BURST, SETTLE_S, Burst, FirstCalls
from vllm_agentserve.policy.gaps import Returns
from vllm_agentserve.policy.known_programs import KnownPrograms
from vllm_agentserve.policy.load_limit import Demand, Limit, Reason, Room
from vllm_agentserve.policy.tier import Tier
from vllm_agentserve.policy.turn_means import TurnMeans

MAX_HOLD_S = 480.0
"""Two minutes less than the time after which clients of the OpenAI API give up by default."""
IDLE = 0.6
"""An engine that has had nothing to do for so many mean gaps lets a program begin: those under way may wait for it."""
BEYOND = 1.0
"""Programs that only seem to be sub-agents may take the claims beyond the limit by this share of it, together: a client can make
its programs look like sub-agents."""
LARGE = 0.5
"""Programs that want more than this share of the limit do not make smaller ones wait."""


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
        host: memory behind the KV cache; none by default.
    """

    def __init__(
        self, pool_tokens: int, block_tokens: int = 16, max_hold_s: float = MAX_HOLD_S, host: Tier | None = None
    ) -> None:
        self.max_hold_s = max_hold_s
        self._block = block_tokens
        self.programs = KnownPrograms()
        self.turns = TurnMeans()
        self.count = ClaimCount(self.programs, self.turns.growth, block_tokens // 2)
        self.room = Room(pool_tokens, host)
        self.limit = Limit(self.room, self.turns)
        self.firsts = FirstCalls()
        self.burst = Burst()
        self._idle_since_s = inf
        """When a held call was first asked for while the engine had nothing else to do, since it last did something."""
        self._begun: Counter[Begins] = Counter()

    @property
    def returns(self) -> Returns:
        """Whether and when programs come back."""
        return self.programs.returns

    # Events.

    def arrive(
        self,
        name: str,
        now_s: float,
        prompt_tokens: int,
        *,
        named: bool = True,
        can_return: bool = True,
        batch: bool = False,
        ahead: bool = False,
        tenant: str = "",
    ) -> LoadCall:
        """A call came. Returns what the other events are told of.

        Args:
            name: of its program; sub-agents are calls of the program that started them.
            named: whether the client said so; otherwise it was inferred.
            can_return: False for what cannot come back: pooling, or no prefix cache.
            batch: whether every interactive call goes before it.
            ahead: whether it goes before others of its class that came before it.
            tenant: see `Call.tenant`.
        """
        program, came_s = self.programs.comes(name, now_s, named, tenant)
        call = LoadCall(program, came_s, prompt_tokens, can_return, batch, ahead)
        if program.turns or program.begun:
            call.why = "returning"
        elif not can_return:
            call.why = "one-shot"
        else:
            self.firsts.waiting[call] = None
            self.burst.comes(now_s)
            if not program.calls:
                self.programs.sub_agents_of(program).comes(program, now_s)
        program.calls[call] = None
        return call

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
        self.firsts.began(call, now_s)
        if program.turns:
            self._resumed(program, now_s, call.prompt_tokens, None if child else cached_tokens)
        # A program whose only call cannot return wants nothing later.
        program.begun |= call.can_return or bool(program.turns)

    def _release(self, call: LoadCall) -> None:
        """The program of a first call is under way from now on, even if the call waits for other reasons."""
        if self.firsts.remove(call):
            if not call.program.begun:
                self.count.begins(call.program, call.prompt_tokens)
            call.program.begun = True

    def _resumed(self, program: Program, now_s: float, prompt_tokens: int, cached_tokens: int | None) -> None:
        turns, there = self.turns, min(program.context, prompt_tokens)
        will = claim(program.wants, turns.growth.value, stays(self.returns, program.named, program.turns + 1))
        turns.parts.add(there / max(will.most, program.context, 1.0))
        turns.new_tokens.add(max(prompt_tokens - program.context, 0))
        if cached_tokens is None:
            return
        found = min(cached_tokens / max(there, 1), 1.0)
        turns.hits.add(found)
        # Of a context of no more than a block nothing can be found.
        if not self.limit.none and there > self._block:
            self.count.update(now_s)
            if there - cached_tokens <= self._block:
                # Only full blocks are found, and the last token of an answer is not in the cache: nothing was pushed out.
                found = 1.0
            self.room.correct(found, self.count.claims.now)

    def end(
        self,
        call: LoadCall,
        now_s: float,
        context_tokens: int,
        *,
        read_s: float,
        read_tokens: int,
        decode_s: float,
        beside_s: float = 0.0,
        whole_s: float = 0.0,
        last: bool = False,
        tool: str | None = None,
        child: bool = False,
    ) -> None:
        """A call that had begun ended.

        Args:
            context_tokens: prompt and answer.
            read_s: engine time its prompt took.
            read_tokens: tokens of the prompt that were computed, again after a preemption included.
            decode_s: what its decoding would have taken alone, in steps without prompts.
            beside_s: how much longer that takes for each other sequence that decodes.
            whole_s: what computing its whole context anew would take, in one go; 0 where that is not known.
            last: whether the client said that the program ends with it.
            tool: what the program does until it comes back, where that was said.
            child: whether it is known to be a sub-agent's: the context of its parent is still needed.
        """
        if not self._over(call):
            return
        program = call.program
        if not (program.begun or call.can_return):
            if not program.calls:
                self.programs.never_began(program)
            return
        if program.turns and context_tokens > program.context:
            self.turns.growth.add(context_tokens - program.context)
        found = bool(program.turns) and 0 < read_tokens <= call.prompt_tokens / 2
        self.limit.check.answered(not program.turns, read_s)
        program.answered(now_s, context_tokens, tool, child)
        self._idle_since_s = inf
        self.turns.answered(read_s, read_tokens, decode_s, beside_s, found)
        if whole_s:
            self.turns.whole_s_per_token.add(whole_s / context_tokens, context_tokens)
        self.firsts.open()
        self.programs.ended(program, now_s)
        if last and not program.calls and self.programs.told_over(program):
            self.count.stale = True

    def _over(self, call: LoadCall) -> bool:
        """A call is no more; returns whether that is new."""
        if call.over:
            return False
        call.over = True
        self.firsts.remove(call)
        self.firsts.leaves(call)
        del call.program.calls[call]
        return True

    def abort(self, call: LoadCall, now_s: float) -> None:
        """A call ended before its answer did, or before it began."""
        held = call.held
        if not self._over(call):
            return
        program = call.program
        program.ended_s = now_s
        if held and program.named:
            self.programs.gives_up(program, call.came_s, now_s)
        if program.calls or program.turns:
            self.programs.leaves(program)
        else:
            self.programs.never_began(program)
        self.count.stale = True
        self.firsts.open()

    def forget(self, program: str) -> None:
        """A program without calls is over. One with calls goes on, unknown ones are no matter."""
        if self.programs.forget(program):
            self.count.stale = True
            self.firsts.open()

    # Decisions.

    def closed(self, now_s: float) -> bool:
        """Whether asking again is of no use yet: `may_begin` said no, and nothing has happened since."""
        return now_s < self.ask_again_s

    @property
    def ask_again_s(self) -> float:
        """When `may_begin` may say something else even if nothing happens; -inf for now."""
        return self.firsts.ask_again_s

    def may_begin(self, call: LoadCall, now_s: float, *, idle: bool) -> bool:
        """Whether a call that waits may be scheduled; ask for the held ones in their order.

        A yes is not taken back, and its program counts as under way. A newcomer does not pass those that are held: asked for
        when it comes, it is held too. Only those that want most of the limit are passed, by smaller ones: else one client
        with a huge prompt would make all others wait.

        Args:
            idle: whether the engine has nothing else to do: nothing runs, and nothing waits that may begin and can run.
        """
        why = self._why(call, now_s, idle)
        if why is None:
            self.firsts.hold(call)
            return False
        if call.why is None:
            self._begun[why] += 1
            call.why = why
            if not call.begun and call in self.firsts.waiting:
                self.firsts.may_begin(call)
        self._release(call)
        return True

    def cannot_run(self, call: LoadCall) -> None:
        """A call that may begin waits for its grammar or other data, and not for the engine: nobody would wait for it."""
        self.firsts.leaves(call)

    def _why(self, call: LoadCall, now_s: float, idle: bool) -> Begins | None:
        """Why it may begin; None if it is held."""
        if call.why is not None:
            return call.why
        if call.program.begun:
            return "returning"
        if now_s - call.came_s >= self.max_hold_s:
            return "bound"
        if self.returns.begins(call.program.named) <= USUAL:
            return "one-shot"
        if self.programs.seems_sub_agent(call.program) and not self.firsts.goes_beyond(call, now_s):
            self.count.update(now_s)
            if self._within_limit(call, 1 + BEYOND):
                return "sub-agent"
            self.firsts.went_beyond(call, now_s, now_s + COUNT_S)
        if self.firsts.closed(call, now_s):
            return None
        self.count.update(now_s)
        newcomer = self.count.newcomer(call.program.named, call.prompt_tokens)
        wanted = (self.count.claims + newcomer).most
        known = self.count.claims.programs + len(self.firsts)
        if self.limit.due(now_s, wanted, known):
            self.limit.decide(now_s, self._demand(), self.returns.gaps.mean_s)
        if self.limit.none:
            if self._others_may_come(call, now_s, idle, wanted, known):
                return None
            return None if self._would_wait(call, now_s, idle, wanted) else "unlimited"
        if not self.count.claims.programs:
            return "alone"
        return self._room_for(call, now_s, idle, wanted, large=newcomer.most > LARGE * self.limit.tokens)

    def _within_limit(self, call: LoadCall, times: float) -> bool:
        """Whether with its program those under way want no more than so many times the limit."""
        newcomer = self.count.newcomer(call.program.named, call.prompt_tokens)
        return self.limit.none or (self.count.claims + newcomer).most <= times * self.limit.tokens

    def _others_may_come(self, call: LoadCall, now_s: float, idle: bool, wanted: float, known: float) -> bool:
        """Whether a call might not fit that is one of many which come together. They are decided on together, a moment later."""
        more = self.limit.reason == "fits" or self.burst.size(now_s) > BURST * known
        unsure = self.limit.better_if_more and more and wanted > self.limit.fitting_tokens
        if not (unsure and self.count.claims.programs) or idle or now_s - call.came_s >= SETTLE_S:
            return False
        self.firsts.close(min(now_s + COUNT_S, call.came_s + SETTLE_S))
        return True

    def _would_wait(self, call: LoadCall, now_s: float, idle: bool, wanted: float) -> bool:
        """Whether a call might not fit and would wait for others first: who has begun cannot be put out again."""
        if idle or self.limit.reason == "fits" or wanted <= self.limit.fitting_tokens:
            return False
        if not self.firsts.would_wait(call, now_s, call.prompt_tokens * self.turns.read_s_per_token.value):
            return False
        self.firsts.close(now_s + COUNT_S)
        return True

    def _room_for(self, call: LoadCall, now_s: float, idle: bool, wanted: float, large: bool) -> Begins | None:
        """Why a call may begin although there is a limit; None if it is held.

        Args:
            wanted: tokens of the programs under way and of its own.
            large: whether it wants most of the limit by itself.
        """
        behind = large and not call.held and self.firsts.passed > 0
        if wanted <= self.limit.tokens and not behind:
            return "fits"
        if idle and not behind and (self._nobody_came(now_s) or self.programs.nobody_returns(now_s)):
            return "idle"
        self.firsts.lets_pass(call, large)
        if not behind:
            self.firsts.close(now_s + COUNT_S, large)
        return None

    def _demand(self) -> Demand:
        """Everybody who is under way or waits."""
        everybody = self.count.claims
        for named in (True, False):
            prompts = [call.prompt_tokens for call in self.firsts.waiting if call.program.named is named]
            if prompts:
                everybody += self.count.newcomer(named, sum(prompts) / len(prompts), len(prompts))
        return Demand(self.count.claims, self.count.surely, len(self.firsts), everybody)

    def _nobody_came(self, now_s: float) -> bool:
        """Whether the engine has done nothing for a mean gap: those under way may wait for the very calls that are held."""
        self._idle_since_s = min(self._idle_since_s, now_s)
        return now_s - self._idle_since_s >= IDLE * self.returns.gaps.mean_s

    # What is seen.

    def report(self, now_s: float | None = None, at_once: bool = False) -> LoadReport:
        """Claims as they are now; without a time, as they were when somebody was last asked for.

        Args:
            at_once: see `ClaimCount.update`.
        """
        if now_s is not None:
            self.count.update(now_s, at_once)
        return LoadReport(
            None if self.limit.none else self.limit.tokens,
            self.limit.reason,
            self.count.claims.most,
            self.room.pool_tokens,
            self.count.claims.programs,
            self.firsts.held,
            self.turns.hits.value,
            self.room.share,
            dict(self._begun),
        )

    def faults(self, known: Container[LoadCall]) -> list[str]:
        """What does not agree, `known` being the calls there are."""
        programs = self.programs
        found = [*programs.faults(known), *self.firsts.faults(programs.live)]
        found += [f"the program {name!r} is live and gone" for name in programs.gone if name in programs.live]
        return found
