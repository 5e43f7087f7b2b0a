"""AgentScheduler: vLLM's own scheduler, with our order of waiting requests and our prefill budget per step.

Nothing of `Scheduler.schedule()` is copied. Two seams carry everything: the waiting queue (`waiting.py`) decides who is
admitted, and `_reserve_prefill_lookahead()`, which vLLM asks for every sequence right before it allocates blocks, decides
how many prompt tokens run. Steps that carry nothing but decodes are vLLM's, with two time stamps around them.
"""

from collections.abc import Callable
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.call import Call, Chunk
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.engine import EnginePolicy
from vllm_agentserve.policy.hints import read_hints
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.waiting import WaitingList
from vllm_agentserve.scheduler.clock import PausedClock
from vllm_agentserve.scheduler.features import Events
from vllm_agentserve.scheduler.features.build import attribution_of, build_features, lane_of, program_order
from vllm_agentserve.scheduler.integrity import Integrity
from vllm_agentserve.scheduler.log_messages import LogMessages
from vllm_agentserve.scheduler.stats import StatsCollector
from vllm_agentserve.scheduler.steps import Step, StepLog
from vllm_agentserve.scheduler.vllm_hooks import VllmHooks, require_hooks
from vllm_agentserve.scheduler.waiting import AgentQueue
from vllm_agentserve.vllm_compat import STATS_FIELD, hooks
from vllm_agentserve.vllm_compat import scheduler as compat
from vllm_agentserve.vllm_compat.host import host_of, repeated_reset

if TYPE_CHECKING:
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

logger = init_logger("vllm.agentserve")


class AgentScheduler(VllmHooks, Scheduler):
    """The scheduler to name in `--scheduler-cls`; it is asynchronous where vLLM's own would be.

    Raises:
        OptionError: an option under `additional_config["agentserve"]` is wrong, or needs the plugin, which is not loaded.
        UnsupportedVllmError: on import, when vLLM is outside the supported window.
    """

    agentserve = True
    controller_type = BudgetController

    def __new__(cls, *args: Any, **kwargs: Any) -> "AgentScheduler":
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        if cls is AgentScheduler and vllm_config.scheduler_config.async_scheduling:
            cls = AsyncAgentScheduler
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = AgentServeConfig.from_additional_config(self.vllm_config.additional_config)
        limits = BudgetLimits(**{name: getattr(options, name) for name in BudgetLimits.__dataclass_fields__})
        stages = self.parallel_config.pipeline_parallel_size
        stock = "mode is 'stock'" if options.mode == "stock" else None
        budget_obstacle, order_obstacle = stock or compat.budget_obstacle(self), stock or compat.order_obstacle(self)
        orders = order_obstacle is None
        controller = self.controller_type(limits, pipeline_depth=stages)
        self._stats = StatsCollector(controller)
        self.counts = self._stats.counts
        """What `/metrics` counts, since the start."""
        self.calls: dict[str, Call] = {}
        """All that is known of requests, by their ids, from arrival to end."""
        self._adapters_in_use: frozenset[int] | None = None
        """See `adapters_in_use`, as the last step with waiting requests found it."""
        self.host = host_of(self)
        """Host memory behind the KV cache."""
        self._clears_host = options.kv_host_gib > 0
        self._unanswered: list[Call] = []
        """Those whose prompt is scheduled to its end, and that have no token yet."""
        block_size = int(self.cache_config.block_size)
        attribution = attribution_of(options, orders, block_size)
        programs = program_order(options if orders else None, controller, self.counts, stages > 1)
        self.clock = PausedClock(perf_counter)
        """By which waiting requests and programs grow older."""
        self.engine_policy = EnginePolicy(
            self,
            controller,
            self.counts,
            self.clock,
            attribution,
            programs,
            options.bypass_steps,
            options.batch_bypass_steps,
            orders=orders,
            cuts=budget_obstacle is None,
            longest_chunk=compat.longest_chunk(self),
        )
        if isinstance(self.engine_policy.waiting, WaitingList):
            self.waiting = AgentQueue(self.engine_policy.waiting, self.calls)
        self._lane = lane_of(self, options, self.engine_policy, self.calls, self.counts, self._looks_for_blocks)
        self._events = Events(
            [
                self._lane,
                *build_features(self, options, self.engine_policy, self.calls, self.counts, self.host, self.clock),
            ]
        )
        self._log = StepLog(self.engine_policy, self.counts, self._events.finished)
        self._decode_width = 1 + self.num_spec_tokens
        self._report_interval_s = options.stats_interval_ms / 1000
        self._next_report = 0.0 if self.log_stats else inf
        self._overlaps = stages > 1 or isinstance(self, AsyncScheduler)
        self._stock_limit = getattr(super(), compat.CHUNK_LIMIT)
        self._said = LogMessages(logger)
        checks = [self.engine_policy.faults, *(feature.faults for feature in self._events.features)]
        self.integrity = Integrity(self, self.calls, checks, options.integrity_check_interval_s)
        lanes, asynchronous = compat.has_lane_connector(self), isinstance(self, AsyncScheduler)
        not_asked = hooks.not_asked()
        if not_asked:
            reason = hooks.plugin_obstacle() or f"the plugin {hooks.PLUGIN!r} is not loaded"
            require_hooks(options, lanes, compat.has_host_connector(self), not_asked, reason)
            self._said.without_plugin(not_asked, reason)
        self._said.startup(options, lanes, asynchronous, budget_obstacle, order_obstacle)

    # -- what the policy asks -------------------------------------------------------------------------------------------

    def cached_tokens(self, call: Call) -> int:
        cached = compat.cached_prefix_tokens(self, call.request)
        return cached + self.host.restorable_tokens(call.request, cached)

    def is_blocked(self, call: Call) -> bool:
        return self._lacks_adapter(call) or not compat.may_run(call.request)

    def _lacks_adapter(self, call: Call) -> bool:
        """Whether a waiting call needs an adapter that cannot be used beside those that are."""
        adapter, in_use = call.request.lora_request, self._adapters_in_use
        return bool(in_use is not None and adapter and adapter.lora_int_id not in in_use)

    def when_ready(self, call: Call, tell: Callable[[Call], None]) -> bool:
        return compat.when_grammar_is_made(call.request, lambda: tell(call)) or self._lacks_adapter(call)

    def is_preempted(self, call: Call) -> bool:
        return call.request.status is RequestStatus.PREEMPTED

    def has_room(self, call: Call) -> bool:
        return not compat.finds_no_place(self, call.request)

    # -- a step ---------------------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> "SchedulerOutput":
        started = perf_counter()
        all_run = len(self.requests) == len(self.running)
        # Some requests are known, and neither run nor wait: such as those that have ended while their blocks are sent.
        if self.engine_policy.prefilling or not (all_run or self._none_waits()):
            return self._schedule_with_prefills(throttle_prefills, started)
        output = super().schedule(throttle_prefills)
        context = self._decode_context() if self._log.wants_context else 0
        self._log.in_flight.append(Step(output, started, len(output.num_scheduled_tokens), context, self._lane.busy))
        return output

    def _none_waits(self) -> bool:
        return not len(self.waiting) and not self.kv_holding_waiting

    def _schedule_with_prefills(self, throttle_prefills: bool, started: float) -> "SchedulerOutput":
        policy, events = self.engine_policy, self._events
        decodes = self._count_decodes()
        context = self._decode_context() if decodes else 0
        for before_step in events.before_step:
            before_step(decodes, context)
        adapters = compat.adapters_in_use(self)
        if adapters != self._adapters_in_use:
            self._adapters_in_use = adapters
            policy.waiting.look_in_order()
        policy.begin_step(self.current_step, compat.admits(self))
        for before_plan in events.before_plan:
            before_plan()
        most = max(self.max_num_scheduled_tokens - decodes * self._decode_width, 1)
        places = compat.free_places(self)
        lane = self._lane
        budget = policy.plan(decodes, context, most, places, bool(self.waiting), lane.busy, lane.has_room)
        # vLLM asks the attribute of the instance: so the question costs nothing in steps without prefill.
        setattr(self, compat.CHUNK_LIMIT, self._grant)
        try:
            output = super().schedule(throttle_prefills)
            policy.end_step(output.total_num_scheduled_tokens < self.max_num_scheduled_tokens)
        except BaseException:
            self._stop_those_not_admitted()
            raise
        finally:
            delattr(self, compat.CHUNK_LIMIT)
            policy.waiting.reopen()
            for after_schedule in events.after_schedule:
                after_schedule()
        chunks, admitted = self._take_chunks(output)
        sequences = len(output.num_scheduled_tokens) - len(chunks)
        self._log.in_flight.append(Step(output, started, sequences, context, lane.busy, chunks, admitted, budget))
        return output

    def _stop_those_not_admitted(self) -> None:
        """Those that were asked for, and do not run after all, compute no prompt."""
        for call in list(self.engine_policy.prefilling):
            if call.request.status is not RequestStatus.RUNNING:
                self.engine_policy.stops(call)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether vLLM may take up a waiting request now.

        vLLM looks at those that hold KV blocks first, and at nobody behind one that gets no tokens.
        """
        ready = bool(super()._handle_blocked_waiting_request(request))
        call = self.calls.get(request.request_id)
        return ready and not (call is not None and self.engine_policy.holds(call))

    def _count_decodes(self) -> int:
        """The sequences whose streams would notice a long step."""
        running, prefills = self.running, len(self.engine_policy.prefilling)
        if self._log.in_flight and not self._overlaps:
            # Steps are in flight although none should be: what they carry has nothing to decode before they are back.
            return sum(request.num_tokens > request.num_computed_tokens for request in running) - prefills
        return len(running) - prefills

    def _grant(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Stands in for vLLM's own `CHUNK_LIMIT`: how many of these tokens run in this step."""
        call, running = self._call(request), request.status is RequestStatus.RUNNING
        if call.served_as is None:
            if running:
                return self._stock_limit(request, num_computed_tokens, num_new_tokens)
            self.engine_policy.admit(call, num_computed_tokens)
        if num_new_tokens > self._decode_width and self.engine_policy.cuts:
            obstacle = compat.cut_obstacle(self, request)
            if obstacle is None:
                num_new_tokens = self.engine_policy.grant(call, num_new_tokens, num_computed_tokens, new=not running)
            else:
                self._said.prefill_not_cut(obstacle)
                self.engine_policy.charge(call, num_new_tokens, num_computed_tokens)
        if not running and num_new_tokens:
            self._looks_for_blocks(call, num_computed_tokens)
        return self._stock_limit(request, num_computed_tokens, num_new_tokens)

    def _looks_for_blocks(self, call: Call, computed: int) -> None:
        """vLLM is about to look for KV blocks for a waiting request, of which so many tokens are computed or cached."""
        for asked in self._events.asked:
            asked(call, computed)

    def _take_chunks(self, output: "SchedulerOutput") -> tuple[list[Chunk], bool]:
        """Reads back which prefill chunks really run and whether one is the first of its prompt; counts admissions and
        forgets prefills that have ended."""
        policy, scheduled = self.engine_policy, output.num_scheduled_tokens
        new = {data.req_id for data in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        chunks: list[Chunk] = []
        cold_ended = False
        self._stop_those_not_admitted()
        for call in list(policy.prefilling):
            request = call.request
            admitted, tokens = request.request_id in new, scheduled.get(request.request_id, 0)
            if admitted:
                self.counts[f"{call.chunk_phase.label}_requests"] += 1
            if tokens:
                chunk = Chunk(call.chunk_phase, tokens, request.num_computed_tokens - tokens)
                chunks.append(chunk)
                policy.computes(call, chunk, first=admitted, last=not request.is_prefill_chunk)
                if not (request.is_prefill_chunk or call.answered or call in self._unanswered):
                    self._unanswered.append(call)
                cold_ended |= chunk.phase is Phase.COLD_PREFILL and not request.is_prefill_chunk
            if admitted:
                for event in self._events.admitted:
                    event(call)
        if cold_ended:
            policy.retag()
        return chunks, bool(new)

    def _decode_context(self) -> int:
        return sum([request.num_computed_tokens for request in self.running])

    # -- what comes back ------------------------------------------------------------------------------------------------

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: "ModelRunnerOutput"
    ) -> dict[int, Any]:
        now = perf_counter()
        self._log.finished(scheduler_output, now)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._unanswered:
            for call in list(self._unanswered):
                self._notice_first_token(call)
        # An engine that becomes idle says how it ended. While calls wait its steps are empty, and a thousand a second.
        if now >= self._next_report or not (self.running or len(self.waiting)):
            self._report(outputs, now)
            if not self.requests:
                self.integrity.when_idle(self._stats, logger)
        return outputs

    def _notice_first_token(self, call: Call) -> None:
        if call.request.num_output_tokens:
            self._unanswered.remove(call)
            call.answered = True
            for answered in self._events.answered:
                answered(call)

    def _report(self, outputs: dict[int, Any], now: float) -> None:
        """Lays our figures beside vLLM's own, which go to one of the API servers."""
        for output in outputs.values():
            if output.scheduler_stats is not None:
                setattr(output.scheduler_stats, STATS_FIELD, self.report())
                self._next_report = now + self._report_interval_s
                return

    def report(self) -> dict[str, float]:
        """What was counted since the last report, and the values of the gauges."""
        self._log.take_in()
        reports = [feature.report for feature in self._events.features]
        return self._stats.take(self.engine_policy.pending_tokens, self._log.last_chunk_tokens, reports)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_running_requests:
            if (obstacle := compat.reset_obstacle(self)) is not None:
                raise RuntimeError(f"the prefix cache is not reset under running requests: {obstacle}")
            for before_reset in self._events.before_reset:
                before_reset()
        # Host memory that our option asked for holds nothing that the cache is to have forgotten.
        with repeated_reset(self):
            done = super().reset_prefix_cache(reset_running_requests, reset_connector or self._clears_host)
        if done:
            for after_reset in self._events.after_reset:
                after_reset()
        return done

    # -- requests come and go -------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        session = self.requests.get(request.request_id)  # this is another part of its input
        known = session is not None
        awaited = session is not None and session.status is RequestStatus.WAITING_FOR_STREAMING_REQ
        if not known:
            self._arrives(request)
        self._catch_up()
        try:
            super().add_request(request)
        except BaseException:
            if not known:
                self.engine_policy.end(self.calls.pop(request.request_id))
            raise
        if session is not None and awaited and session.status is RequestStatus.WAITING:
            self.engine_policy.continues(self._call(session))
        if not known:
            call = self.calls[request.request_id]
            if call.key is not None:
                self.engine_policy.offered(call.key.tokens)
            for arrived in self._events.arrived:
                arrived(call)

    def set_pause_state(self, pause_state: "PauseState") -> None:
        super().set_pause_state(pause_state)
        self.clock.admits(compat.admits(self))

    def _catch_up(self) -> None:
        """Tells the policy what quiet steps do not."""
        policy = self.engine_policy
        policy.waiting.step, policy.decodes = self.current_step, len(self.running) - len(policy.prefilling)

    def _call(self, request: Request) -> Call:
        """The record of a request. One that did not come through `add_request`, as in vLLM's own tests, gets it here."""
        return self.calls.get(request.request_id) or self._arrives(request)

    def _arrives(self, request: Request) -> Call:
        parameters = request.sampling_params
        call = self.calls[request.request_id] = Call(request)
        if parameters is not None and parameters.extra_args:
            call.hints, errors = read_hints(parameters.extra_args)
            self.counts["invalid_hints"] += len(errors)
            for error in errors:
                self._said.invalid_hint(error)
            if call.hints.deadline_ms is not None:
                call.due = perf_counter() + call.hints.deadline_ms / 1000
        self.engine_policy.arrive(call)
        return call

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.engine_policy.waiting.step = self.current_step
        call = self._call(request)
        self.engine_policy.stops(call)
        super()._preempt_request(request, *args, **kwargs)
        for preempted in self._events.preempted:
            preempted(call)

    def _handle_stopped_request(self, request: Request) -> bool:
        call, policy = self._call(request), self.engine_policy
        if call in self._unanswered:
            # What a streamed session has answered becomes part of its prompt.
            self._notice_first_token(call)
        ended = bool(super()._handle_stopped_request(request))
        if not ended:
            # It is a streamed session: its next part is there already, or it waits for that.
            policy.waiting.step = self.current_step
            (policy.continues if request.status is RequestStatus.WAITING else policy.suspends)(call)
        return ended

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        call = self._call(request)
        del self.calls[request.request_id]
        self.engine_policy.end(call)
        if call in self._unanswered:
            self._notice_first_token(call)
            self._unanswered = [other for other in self._unanswered if other is not call]
        for freed in self._events.freed:
            freed(call)
        return super()._free_request(request, *args, **kwargs)


class AsyncAgentScheduler(AgentScheduler, AsyncScheduler):
    """AgentScheduler where vLLM schedules asynchronously (the default on CUDA)."""
