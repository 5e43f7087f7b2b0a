"""The policy of one engine: what arrives, in which order it is admitted, and how many prompt tokens a step computes.

The scheduler drives this object with vLLM's requests, the simulator with its own, and both ask the same questions.
"""

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from math import inf
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
from vllm_agentserve.policy.program import Beginnings, bounded
from vllm_agentserve.policy.step_order import NO_ORDER, NoOrder, StepOrder, by_arrival, not_begun, overdue_first, place
from vllm_agentserve.policy.waiting import VllmOrder, WaitingList


class Engine(Protocol):
    """What the policy asks of the engine that it decides for."""

    def cached_tokens(self, call: Call) -> int:
        """Tokens of a waiting call whose KV is there already."""
        ...

    def is_blocked(self, call: Call) -> bool:
        """Whether a waiting call waits for something that no step brings it, such as its grammar."""
        ...

    def when_ready(self, call: Call, tell: Callable[[Call], None]) -> bool:
        """Whether a blocked call waits for something that ends by itself; then `tell` is called with it at that moment, from
        whichever thread, or `WaitingList.look_in_order`."""
        ...

    def is_preempted(self, call: Call) -> bool:
        """Whether the engine took a waiting call's KV blocks away after it had run."""
        ...

    def has_room(self, call: Call) -> bool:
        """Whether a waiting call finds a place and KV blocks now."""
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
        orders: whether calls are ordered here, and not by vLLM.
        cuts: whether prompts are cut to a budget.
        longest_chunk: tokens that the engine computes of one prompt in a step at most, if others are there.
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
        longest_chunk: float = inf,
    ) -> None:
        self._engine = engine
        self.controller = controller
        self._counts = counts
        self._attribution = attribution
        self.programs = programs
        self._now = clock
        self.cuts = cuts
        self._orders = orders
        self._longest_chunk = longest_chunk
        self.decodes = 0
        """Sequences that decode, as far as is known."""
        self._planned_decodes = 0
        """As the last step was planned."""
        self._order: NoOrder = NO_ORDER
        """Of the prompts of the step that is being scheduled."""
        self.sessions = SessionTable()
        self._beginnings = Beginnings()
        self.waiting: VllmOrder = VllmOrder()
        if orders:
            self.waiting = WaitingList(
                self._key_of,
                bypass_steps,
                batch_bypass_steps,
                DECIDE_STEPS,
                clock,
                engine.is_blocked,
                engine.when_ready,
            )
        self.prefilling: list[Call] = []
        """Calls whose prompts are being computed in steps, in order of admission."""
        self.restoring: dict[Call, None] = {}
        """Calls whose KV is copied back from host memory before a step takes them up, and streamed sessions whose next part is
        there, in this order. They hold KV blocks, and need places."""
        self._held: list[Call] = []
        """Those of them that cannot begin in the step that is being scheduled."""
        self.budget: StepBudget | None = None
        """Of the step that is being scheduled; None where nothing is cut."""
        self._crowded = False
        """See `Backlog`."""
        self._cold_waited = False
        """Whether the last step had nothing for a cold prompt that was offered to it."""
        self._has_prompt = False
        """Whether a chunk of a prompt is in the step that is being scheduled."""

    # -- a call ---------------------------------------------------------------------------------------------------------

    def arrive(self, call: Call) -> None:
        """A call came; it is in the waiting list only after it was added there."""
        call.owner = self._attribution.owner(call)
        call.began = self._beginnings.number(call.owner.key)
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
        uncached, level, phase = call.request.num_tokens - cached, self.programs.level(call), self.phase(call, cached)
        call.found_resume = phase is Phase.RESUME_PREFILL
        key = admission_key(
            phase,
            uncached,
            call.number,
            self._resume_budget,
            level,
            hints.batch,
            call.due,
            priority=hints.precedence,
            program=call.began,
        )
        if call.lost_ms is None and self._engine.is_preempted(call):
            return ahead(key, Urgency.PREEMPTED, call.number)
        return key

    @property
    def _resume_budget(self) -> float:
        """The longest resume prefill that goes before cold ones: any where nobody decodes, since no stream waits for it."""
        return self.controller.resume_tokens if self.decodes or not self._orders else inf

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
        self.restoring.pop(call, None)

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
            places: calls that can be admitted; those that are restored have theirs already.
            waits: whether any call waits.
            beside_lane: whether a prefill lane has part of the device.
            lane_room: whether a prefill lane can take a prompt.
        """
        self._held = []
        if not self.cuts:
            return None
        self._follow_decodes(decodes)
        restored = [(call, self._serves(call, call.request.num_computed_tokens)) for call in self.restored()]
        coming = restored[: max(places, 0)]
        # If none could be admitted in the last step, the KV cache has no room, or as many run as may.
        places = max(places - len(self.restoring), 0) if waits and not self.waiting.blocked else 0
        # A cold prompt may still be for the lane, unless one was found to be for steps, and to have to wait.
        for_lane = lane_room and not self._cold_waited
        begins, ranked = self._line_up(places, coming, begin=not for_lane)
        phases = {call.served_as for call in self.prefilling} | {served for _, served in restored}
        resume_tokens = self._resume_tokens(places)
        resume_tokens += sum(max(call.left, 1) for call, served in restored if served is Phase.RESUME_PREFILL)
        self.budget = budget = self.controller.plan(
            decodes,
            context,
            max_tokens,
            resumes=resume_tokens > 0 or Phase.RESUME_PREFILL in phases,
            colds=Phase.COLD_PREFILL in phases or self.waiting.has_cold(waits),
            waiting_resume_tokens=resume_tokens,
            admits=(waits and (not self.prefilling or bool(begins))) or (bool(restored) and not self.prefilling),
            beside_lane=beside_lane,
            backlog=self.backlog(),
            ordered=self._orders,
            ranked=ranked,
        )
        if not for_lane:
            self._hold_colds(budget, begins, [call for call, served in restored if served is Phase.COLD_PREFILL])
        self._cold_waited = False
        return budget

    def _follow_decodes(self, decodes: int) -> None:
        """Whether anybody decodes decides how long a resume prefill may be: those that are there are told apart anew."""
        before, self.decodes, self._planned_decodes = self._planned_decodes, decodes, decodes
        if not self._orders or (decodes > 0) is (before > 0):
            return
        longest = self._resume_budget
        self.waiting.sort_resumes(longest, LOOK_AHEAD)
        for call in self.prefilling:
            short = call.phase is Phase.RESUME_PREFILL and call.left <= longest
            call.served_as = Phase.RESUME_PREFILL if short else Phase.COLD_PREFILL

    def _line_up(
        self, places: int, coming: Sequence[tuple[Call, Phase]], begin: bool
    ) -> tuple[dict[Call, AdmissionKey], bool]:
        """Orders the prompts of the step.

        Args:
            places: calls that can be admitted.
            coming: calls that have KV and find a place, with the queues they are served from.
            begin: whether a cold prompt that waits may begin before one that is being computed.

        Returns:
            the cold prompts that may do so, in order, with their places, and whether there are prompts of several classes.
        """
        computed, alone = self.prefilling, not self.decodes
        self._order = NO_ORDER
        several = len(computed) > 1 or bool(computed and coming)
        if not self._orders or not (several or (places > 0 and (alone or self._one_goes_before(computed)))):
            return {}, False
        self._order = order = StepOrder(computed, self._longest_chunk)
        begins: dict[Call, AdmissionKey] = {}
        places = min(places, LOOK_AHEAD)
        last = order.last()
        for call, served in coming if computed else ():
            key = self._place_of(call, served)
            if key < last:
                order.join(call, key)
        for call in self.waiting.in_order(places) if computed else ():
            assert call.key is not None
            key = self._would_stand(call, call.key)
            if key < last and not key.cold:
                order.join(call, key)
            elif key < last and begin and (begins or self._may_begin(call)):
                order.join(call, key)
                begins[call] = key
            elif call.key.urgency is Urgency.PREEMPTED or key < last:
                # Cold ones behind a cold one that cannot begin are not offered.
                begin = begin and not key.cold
            else:
                break
        return begins, alone and order.kinds(self.waiting.in_order(places)) > 1

    def _one_goes_before(self, computed: list[Call]) -> bool:
        """Whether the first call that waits may go before the only one whose prompt is being computed."""
        first = self.waiting.front() if computed else None
        if first is None or first.key is None:
            return False
        return self._would_stand(first, first.key) < place(computed[0])

    def _would_stand(self, call: Call, key: AdmissionKey) -> AdmissionKey:
        """The place of a call that waits, were its prompt computed; one that vLLM preempted had begun before."""
        if key.urgency is not Urgency.PREEMPTED:
            return not_begun(key)
        return overdue_first(call, by_arrival(self._normal(call, key)))

    def _place_of(self, call: Call, served: Phase) -> AdmissionKey:
        """The place of a call that has KV and waits for its next step."""
        cold, left = served is Phase.COLD_PREFILL, max(call.left, 1)
        key = self._normal(call, None)._replace(cold=cold, uncached=0 if cold else left, tokens=left)
        return overdue_first(call, key)

    def _may_begin(self, call: Call) -> bool:
        return not self.waiting.turned_away(call) and self._engine.has_room(call)

    def _normal(self, call: Call, key: AdmissionKey | None) -> AdmissionKey:
        """The key of a call that stands in its class, at its level."""
        if key is None:
            key = AdmissionKey(Urgency.NORMAL, arrival=call.number)
        elif key.urgency is Urgency.NORMAL:
            return key
        hints, level = call.hints, self.programs.level(call)
        return key._replace(
            urgency=Urgency.NORMAL, batch=hints.batch, level=level, priority=-hints.precedence, due=call.due
        )

    def _resume_tokens(self, places: int) -> int:
        """Tokens of the resume prefills that go before the first cold prompt of the step, which may be asked for before them.

        Beside decodes they do so in its class and in better ones, whatever the rest of the order: the resume budget bounds what
        they take. Where nobody decodes nothing bounds it, and the order decides.
        """
        waiting = self.waiting.waiting_resume_tokens(places) if places > 0 else 0
        running = [call for call in self.prefilling if call.served_as is Phase.RESUME_PREFILL]
        first = self._first_cold() if self._orders and (waiting or running) else None
        if first is not None:

            def counts(key: AdmissionKey) -> bool:
                if not self.decodes:
                    return key < first
                return key.urgency < Urgency.NORMAL or (key.batch, key.priority, key.due) <= (
                    first.batch,
                    first.priority,
                    first.due,
                )

            waiting = self.waiting.waiting_resume_tokens(places, counts) if waiting else 0
            running = [call for call in running if counts(place(call))]
        return waiting + sum(call.left for call in running)

    def _first_cold(self) -> AdmissionKey | None:
        """The place of the first cold prompt that is being computed or is at the front of those that wait; beside decodes the
        place it has in its class."""
        computed = [call for call in self.prefilling if call.served_as is Phase.COLD_PREFILL]
        keys = [by_arrival(call.place) if self.decodes and call.place is not None else place(call) for call in computed]
        front = self.waiting.front()
        if front is not None and front.key is not None and front.key.cold:
            keys.append(by_arrival(self._normal(front, front.key) if self.decodes else front.key))
        return min(keys, default=None)

    def _hold_colds(self, budget: StepBudget, begins: dict[Call, AdmissionKey], restored: list[Call]) -> None:
        """While a cold prompt that is being computed does not end in this step, no other can begin in it that is not better."""
        going_on = [
            call
            for call in self.prefilling
            if call.served_as is Phase.COLD_PREFILL
            and not budget.finishes(call.left, call.request.num_computed_tokens, self._order.standing(call, False))
        ]
        if not going_on:
            return
        if not self._orders:
            self._held = restored
            self.waiting.hold_colds()
            return
        first = min(place(call) for call in going_on)
        self._held = [call for call in restored if self._place_of(call, Phase.COLD_PREFILL) >= first]
        self.waiting.hold_colds([call for call, key in begins.items() if key < first])

    def backlog(self) -> Backlog:
        """The prompts for which a longer step is worth something: those that are being computed and those that clients wait for.
        Those that wait for a place or for KV blocks too: these come free the sooner the less time is lost between chunks."""
        waiting = self.waiting.backlog()
        restored = self.restored()
        left = sum(call.left for call in self.prefilling) + sum(max(call.left, 1) for call in restored)
        prompts = waiting.prompts + len(self.prefilling) + len(restored)
        return Backlog(prompts, waiting.tokens + left, waiting.waited_ms, self._crowded)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens still to be computed in steps, of prompts that are being computed and of those that wait."""
        begun = (*self.prefilling, *self.restoring)
        return sum(call.left for call in begun) + self.waiting.tokens

    def admit(self, call: Call, computed: int) -> None:
        """A step takes up the prompt of a call, of which so many tokens are computed or cached."""
        call.phase = call.lane.phase if call.lane.phase is not None else self.phase(call, computed)
        call.served_as = self._serves(call, computed, call.phase)
        call.place = self._normal(call, call.key) if self._orders else None
        self.prefilling.append(call)

    def _serves(self, call: Call, computed: int, phase: Phase | None = None) -> Phase:
        """The queue whose share of the budget a prompt gets that has so many tokens computed, in this phase."""
        phase = self.phase(call, computed) if phase is None else phase
        short = call.request.num_tokens - computed <= self._resume_budget
        return Phase.RESUME_PREFILL if short and phase is Phase.RESUME_PREFILL else Phase.COLD_PREFILL

    def restores(self, call: Call) -> None:
        """The engine copies KV of a waiting call back from host memory. The call does not wait for steps meanwhile."""
        self.restoring[call], call.restored = None, False

    def is_restored(self, call: Call) -> None:
        """That is done; a call that has ended meanwhile is ignored."""
        if call in self.restoring:
            call.restored = True

    def restored(self) -> list[Call]:
        """The calls for which that is done: the next step can take them up."""
        return [call for call in self.restoring if call.restored]

    def holds(self, call: Call) -> bool:
        """Whether a restored call cannot begin in the step that is being scheduled: a cold prompt that goes on takes its time."""
        return call in self._held

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
        standing = self._order.standing(call, waits=new)
        granted = self.budget.grant(call.served_as, wanted, computed, standing)
        self._order.asked(call)
        if new:
            cold = call.served_as is Phase.COLD_PREFILL
            self._cold_waited |= self.waiting.refuses(call, cold, granted, wanted)
        return granted

    def charge(self, call: Call, tokens: int, computed: int) -> None:
        """A prompt that must not be cut takes so many tokens of the step's budget."""
        assert self.budget is not None
        assert call.served_as is not None
        self._order.asked(call)
        self.budget.charge(call.served_as, tokens, computed)

    def computes(self, call: Call, chunk: Chunk, first: bool, last: bool) -> None:
        """A chunk of a prompt is scheduled: the `first` since the call was admitted, the `last` of the prompt, or both."""
        if first:
            self.restoring.pop(call, None)
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
            call.served_as = call.place = None
            self.prefilling.remove(call)

    def suspends(self, call: Call) -> None:
        """A streamed session has answered a part of its input and waits for the next one; it does not run."""
        self.stops(call)
        self.restoring.pop(call, None)
        self.programs.suspends(call, self._now())

    def continues(self, call: Call) -> None:
        """The next part of a streamed session is there: it waits for a step, with its KV."""
        self.stops(call)
        if call.key is None:
            self.restoring[call], call.restored = None, True
            self.waiting.waits_anew(call)
        self.programs.continues(call, self._now())

    def retag(self) -> None:
        """A cold prompt has been computed: what others share with it may be cached now."""
        self.waiting.retag(LOOK_AHEAD)

    def end_step(self, tokens_left: bool) -> None:
        """A step has been scheduled; whether it could have had more tokens."""
        self.waiting.end_step(tokens_left)
        self._crowded = (self.waiting.blocked or self._crowded) and self.waiting.backlog().prompts > 0

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
        found += [f"{call.name!r} is being restored, and is gone" for call in self.restoring if call not in known]
        found += [
            f"{call.name!r} is marked as having a prefill in steps, and has none"
            for call in calls
            if (call.served_as is not None) != (call in self.prefilling)
        ]
        return found + self.waiting.faults(calls) + self.programs.faults(calls)
