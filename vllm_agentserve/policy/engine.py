"""The policy of one engine: what arrives, in which order it is admitted, and how many prompt tokens a step computes.

The scheduler drives this object with vLLM's requests, the simulator with its own, and both ask the same questions.
"""

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Protocol

from vllm_agentserve.policy.budget import StepBudget
from vllm_agentserve.policy.call import Backlog, Call, Chunk, Owner
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.order import (
    BYPASS_STEPS,
    DECIDE_STEPS,
    LOOK_AHEAD,
    AdmissionKey,
    Urgency,
    admission_key,
    ahead,
)
from vllm_agentserve.policy.phase import Phase, SessionTable, classify
from vllm_agentserve.policy.preemption import Rank
from vllm_agentserve.policy.program import bounded
from vllm_agentserve.policy.waiting import VllmOrder, WaitingList


class Engine(Protocol):
    """What the policy asks of the engine that it decides for."""

    def cached_tokens(self, call: Call) -> int:
        """Tokens of a waiting call whose KV is there already."""
        ...

    def is_blocked(self, call: Call) -> bool:
        """Whether a waiting call waits for something that no step brings it, such as its grammar."""
        ...

    def is_preempted(self, call: Call) -> bool:
        """Whether the engine took a waiting call's KV blocks away after it had run."""
        ...


class NoAttribution:
    """Nobody asks whose a request is: each is its own. Also the interface of `Attribution`."""

    def owner(self, call: Call) -> Owner:
        """Whose a request is."""
        return Owner(f"request {bounded(call.name)}", 0.0, source="new")

    def remember(self, call: Call, path_ms: float, end: int) -> None:
        """The call has ended, with a path of this length to its end, which has this number; others may go on from its answer."""


class NoPrograms:
    """Programs are not told apart: every call waits at the same level. Also the interface of `ProgramOrder`."""

    relevels = False
    """Whether the levels of calls change while they wait."""

    def arrives(self, call: Call, now: float) -> None:
        """A call came, at `now` (s)."""

    def waits(self, call: Call, now: float) -> None:
        """A call is about to be sorted into the waiting ones, or is looked at again there."""

    def level(self, call: Call) -> int:
        """The level of a call, waiting or not, 0 is the first."""
        return 0

    def runs(self, call: Call, computed: int) -> None:
        """A call is admitted with so many of its tokens computed."""

    def computes(self, call: Call, chunk: Chunk, cost_ms: float, now: float) -> None:
        """A chunk of the call's prompt is scheduled, which takes so much of the whole device."""

    def decodes(self, call: Call) -> None:
        """The call's prompt is computed."""

    def suspends(self, call: Call, now: float) -> None:
        """A streamed session has answered a part of its input, and waits for the next one."""

    def continues(self, call: Call, now: float) -> None:
        """The next part of its input is there."""

    def stepped(self, sequences: int, step_ms: float, chunks: Sequence[Chunk]) -> None:
        """A step with so many decodes and these chunks took so long."""

    def ends(self, call: Call, now: float) -> tuple[float, int]:
        """The call is finished or aborted; returns the length of the path to its end in ms, and the number of that end."""
        return 0.0, 0

    def faults(self, calls: Iterable[Call]) -> list[str]:
        """What does not agree, `calls` being all there are; O(n)."""
        return []


class EnginePolicy:
    """Decides for one engine.

    Args:
        engine: it decides for.
        controller: turns step times into budgets.
        counts: what `/metrics` counts; gets `overdue_requests` and `offered_prefill_seconds`.
        clock: seconds, of waiting times, programs and deadlines.
        attribution: says whose a call is.
        programs: order of calls by their programs.
        bypass_steps: engine steps a call may be overtaken before it goes first; infinite for no bound.
        batch_bypass_steps: the same for calls of class batch; None for the same.
        orders: whether waiting calls are ordered here, and not by vLLM.
        cuts: whether prompts are cut to a budget.
    """

    def __init__(
        self,
        engine: Engine,
        controller: BudgetController,
        counts: MutableMapping[str, float],
        clock: Callable[[], float],
        attribution: NoAttribution,
        programs: NoPrograms,
        bypass_steps: float = BYPASS_STEPS,
        batch_bypass_steps: float | None = None,
        orders: bool = True,
        cuts: bool = True,
    ) -> None:
        self._engine = engine
        self.controller = controller
        self._counts = counts
        self._attribution = attribution
        self.programs = programs
        self._now = clock
        self.cuts = cuts
        self.sessions = SessionTable()
        self.waiting: VllmOrder = VllmOrder()
        if orders:
            self.waiting = WaitingList(
                self._key_of, bypass_steps, batch_bypass_steps, DECIDE_STEPS, clock, engine.is_blocked
            )
        self.prefilling: list[Call] = []
        """Calls whose prompts are being computed in steps, in order of admission."""
        self.budget: StepBudget | None = None
        """Of the step that is being scheduled; None where nothing is cut."""
        self._cold_waited = False
        """Whether the last step had nothing for a cold prompt that was offered to it."""
        self._has_prompt = False
        """Whether a chunk of a prompt is in the step that is being scheduled."""

    # -- a call ---------------------------------------------------------------------------------------------------------

    def arrive(self, call: Call) -> None:
        """A call came; it is in the waiting list only after it was added there."""
        call.owner = self._attribution.owner(call)
        self.programs.arrives(call, self._now())

    def offered(self, tokens: int) -> None:
        """Counts the uncached tokens of a new call as time of the whole device; nothing before its speed is measured."""
        rate = self.controller.device_rate(tokens, 0)
        if rate is not None:
            self._counts["offered_prefill_seconds"] += tokens / rate

    def phase(self, call: Call, computed: int) -> Phase:
        """What a call is that has so many tokens computed or cached."""
        known = call.session in self.sessions
        return classify(computed, call.request.num_tokens - computed, known_session=known)

    def key(self, call: Call) -> AdmissionKey:
        """The sort key of a waiting call."""
        cached, hints = self._engine.cached_tokens(call), call.hints
        uncached, level = call.request.num_tokens - cached, self.programs.level(call)
        resume_tokens = self.controller.resume_tokens
        key = admission_key(
            self.phase(call, cached),
            uncached,
            call.number,
            resume_tokens,
            level,
            hints.batch,
            call.due,
            hints.priority,
        )
        if call.lost_ms is None and self._engine.is_preempted(call):
            return ahead(key, Urgency.PREEMPTED, call.number)
        return key

    def _key_of(self, call: Call) -> AdmissionKey:
        self.programs.waits(call, self._now())
        return self.key(call)

    def rank(self, call: Call) -> Rank:
        """Class and level of a call that waits no more."""
        return Rank(call.hints.batch, self.programs.level(call))

    def end(self, call: Call) -> None:
        """The call is finished or aborted: nothing is known of it from now on."""
        if call.request.num_computed_tokens > 0:
            self.sessions.touch(call.session)
        self._attribution.remember(call, *self.programs.ends(call, self._now()))
        self.waiting.forget(call)
        self.stops(call)

    # -- a step ---------------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, admits: bool = True) -> None:
        """A step with waiting calls or prompts is about to be scheduled; `admits`: whether the engine admits any call."""
        self._has_prompt = False
        self._counts["overdue_requests"] += self.waiting.begin_step(step, self.programs.relevels, admits)

    def plan(
        self,
        decodes: int,
        context: int,
        max_tokens: int,
        places: int,
        waits: bool,
        beside_lane: bool = False,
        lane_room: bool = False,
    ) -> StepBudget | None:
        """Plans the budget of the next step; None where nothing is cut.

        Args:
            decodes: sequences that decode in the step.
            context: their summed context, in tokens.
            max_tokens: prompt tokens the step can take at most, at least 1.
            places: calls that can be admitted.
            waits: whether any call waits.
            beside_lane: whether a prefill lane has part of the device.
            lane_room: whether a prefill lane can take a prompt.
        """
        if not self.cuts:
            return None
        phases = {call.served_as for call in self.prefilling}
        waiting_resumes = 0
        # If none could be admitted in the last step, the KV cache has no room, or as many run as may.
        if places > 0 and not self.waiting.blocked:
            waiting_resumes = self.waiting.waiting_resume_tokens(places)
        # A cold prompt may be asked first although it runs beside them.
        waiting_resumes += sum(call.left for call in self.prefilling if call.served_as is Phase.RESUME_PREFILL)
        self.budget = budget = self.controller.plan(
            decodes,
            context,
            max_tokens,
            resumes=waiting_resumes > 0 or Phase.RESUME_PREFILL in phases,
            colds=Phase.COLD_PREFILL in phases or self.waiting.has_cold(waits),
            waiting_resume_tokens=waiting_resumes,
            admits=waits and not self.prefilling,
            beside_lane=beside_lane,
            backlog=self.backlog(),
        )
        # A cold prompt may still be for the lane, unless one was found to be for steps, and to have to wait.
        if not (lane_room and not self._cold_waited) and self._a_cold_prompt_goes_on(budget):
            self.waiting.hold_colds()
        self._cold_waited = False
        return budget

    def _a_cold_prompt_goes_on(self, budget: StepBudget) -> bool:
        """Whether a cold prompt that is being computed will not end in this step: then no other can begin in it."""
        return any(
            call.served_as is Phase.COLD_PREFILL and not budget.finishes(call.left, call.request.num_computed_tokens)
            for call in self.prefilling
        )

    def backlog(self) -> Backlog:
        """The prompts for which a longer step is worth something: those that are being computed and those that clients wait for.
        Those that wait for a place or for KV blocks too: these come free the sooner the less time is lost between chunks."""
        waiting = self.waiting.backlog()
        left = sum(call.left for call in self.prefilling)
        return Backlog(waiting.prompts + len(self.prefilling), waiting.tokens + left, waiting.waited_ms)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens still to be computed in steps, of prompts that are being computed and of those that wait."""
        return sum(call.left for call in self.prefilling) + self.waiting.tokens

    def admit(self, call: Call, computed: int) -> None:
        """A step takes up the prompt of a call, of which so many tokens are computed or cached."""
        call.phase = call.lane.phase if call.lane.phase is not None else self.phase(call, computed)
        short = call.request.num_tokens - computed <= self.controller.resume_tokens
        call.served_as = Phase.RESUME_PREFILL if short and call.phase is Phase.RESUME_PREFILL else Phase.COLD_PREFILL
        self.prefilling.append(call)

    def grant(self, call: Call, wanted: int, computed: int, new: bool) -> int:
        """How many of the `wanted` tokens of a prompt the step computes, over `computed` ones.

        Args:
            call: it belongs to; `admit` has been called.
            wanted: tokens, at least 1.
            computed: tokens before them.
            new: whether the call waits, and is admitted if it is granted a token.
        """
        assert self.budget is not None
        assert call.served_as is not None
        granted = self.budget.grant(call.served_as, wanted, computed)
        if new:
            cold = call.served_as is Phase.COLD_PREFILL
            self._cold_waited |= self.waiting.refuses(call, cold, granted, wanted)
        return granted

    def charge(self, call: Call, tokens: int, computed: int) -> None:
        """A prompt that must not be cut takes so many tokens of the step's budget."""
        assert self.budget is not None
        assert call.served_as is not None
        self.budget.charge(call.served_as, tokens, computed)

    def computes(self, call: Call, chunk: Chunk, first: bool, last: bool) -> None:
        """A chunk of a prompt is scheduled: the `first` since the call was admitted, the `last` of the prompt, or both."""
        if first:
            self._runs(call, chunk.context)
        self._takes(call, chunk)
        if not self._has_prompt:
            self._has_prompt = True
            call.computed_ms += self.controller.whole.model.mixing_ms()
        if last:
            self.stops(call)
            self.programs.decodes(call)

    def lane_computes(self, call: Call, chunk: Chunk) -> None:
        """A prompt goes to the prefill lane, which computes this much of it."""
        self._runs(call, chunk.context)
        self._takes(call, chunk)

    def _runs(self, call: Call, computed: int) -> None:
        if call.cached_tokens is None:
            call.cached_tokens = computed
        self.programs.runs(call, computed)

    def _takes(self, call: Call, chunk: Chunk) -> None:
        cost_ms = self.controller.prompt_ms(chunk.tokens, chunk.context)
        call.computed_tokens += chunk.tokens
        call.computed_ms += cost_ms
        self.programs.computes(call, chunk, cost_ms, self._now())

    def stops(self, call: Call) -> None:
        """Steps compute no more of a call's prompt: it has ended, or the call has lost its place."""
        if call.served_as is not None:
            call.served_as = None
            self.prefilling.remove(call)

    def suspends(self, call: Call) -> None:
        """A streamed session has answered a part of its input and waits for the next one; it does not run."""
        self.stops(call)
        self.programs.suspends(call, self._now())

    def continues(self, call: Call) -> None:
        """The next part of a streamed session is there: it waits for a step, with its KV."""
        self.stops(call)
        self.programs.continues(call, self._now())

    def retag(self) -> None:
        """A cold prompt has been computed: what others share with it may be cached now."""
        self.waiting.retag(LOOK_AHEAD)

    def end_step(self, tokens_left: bool) -> None:
        """A step has been scheduled; whether it could have had more tokens."""
        self.waiting.end_step(tokens_left)

    def observe(
        self,
        step_ms: float,
        interval_ms: float | None,
        sequences: int,
        context: int,
        chunks: Sequence[Chunk],
        admitted: bool = False,
        beside_lane: bool = False,
        budget: StepBudget | None = None,
    ) -> None:
        """A step has finished; the arguments are those of `BudgetController.observe`."""
        if self.programs.relevels:
            self.programs.stepped(sequences, step_ms, chunks)
        self.controller.observe(step_ms, interval_ms, sequences, context, chunks, admitted, beside_lane, budget)

    def faults(self, calls: Iterable[Call]) -> list[str]:
        """What does not agree between two steps, `calls` being all there are; O(n)."""
        calls = list(calls)
        known = set(calls)
        found = [f"{call.name!r} has a prefill in steps, and is gone" for call in self.prefilling if call not in known]
        found += [
            f"{call.name!r} is marked as having a prefill in steps, and has none"
            for call in calls
            if (call.served_as is not None) != (call in self.prefilling)
        ]
        return found + self.waiting.faults(calls) + self.programs.faults(calls)
