"""AgentScheduler: vLLM's own scheduler, with our order of waiting requests and our prefill budget per step.

Nothing of `Scheduler.schedule()` is copied. Two seams carry everything: the waiting queue (`queues.py`) decides who is
admitted, and `_reserve_prefill_lookahead()`, which vLLM asks for every sequence right before it allocates blocks, decides
how many prompt tokens run. Steps that carry nothing but decodes are vLLM's, with two time stamps around them.
"""

from time import perf_counter
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.connector_scheduler import LaneConnectorScheduler
from vllm_agentserve.policy.budget import StepBudget
from vllm_agentserve.policy.controller import BudgetController, BudgetLimits
from vllm_agentserve.policy.order import DECIDE_STEPS, LOOK_AHEAD
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.scheduler.admission import Admission
from vllm_agentserve.scheduler.integrity import Integrity
from vllm_agentserve.scheduler.ledger import LaneLedger
from vllm_agentserve.scheduler.log_messages import LogMessages
from vllm_agentserve.scheduler.planning import a_cold_prompt_goes_on, close_line, count_decodes, plan_step, tokens_left
from vllm_agentserve.scheduler.preempter import Preempter
from vllm_agentserve.scheduler.programs import ProgramTracker
from vllm_agentserve.scheduler.queues import AgentQueue
from vllm_agentserve.scheduler.stats import StatsCollector
from vllm_agentserve.scheduler.steps import Prefill, Step, StepLog
from vllm_agentserve.scheduler.upstream import UpstreamHooks
from vllm_agentserve.vllm_compat import STATS_FIELD
from vllm_agentserve.vllm_compat import scheduler as compat

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

logger = init_logger("vllm.agentserve")


class AgentScheduler(UpstreamHooks, Scheduler):
    """The scheduler to name in `--scheduler-cls`; it is asynchronous where vLLM's own would be.

    Raises:
        OptionError: an option under `additional_config["agentserve"]` is wrong.
        UnsupportedVllmError: on import, when vLLM is outside the supported window.
    """

    agentserve = True

    def __new__(cls, *args: Any, **kwargs: Any) -> "AgentScheduler":
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        if cls is AgentScheduler and vllm_config.scheduler_config.async_scheduling:
            cls = AsyncAgentScheduler
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = AgentServeConfig.from_additional_config(self.vllm_config.additional_config)
        limits = BudgetLimits(**{name: getattr(options, name) for name in BudgetLimits.__dataclass_fields__})
        self._controller = BudgetController(limits, pipeline_depth=self.parallel_config.pipeline_parallel_size)
        self._stats = StatsCollector(self._controller)
        self.counts = self._stats.counts
        """What `/metrics` counts, since the start."""
        self._prefills: dict[str, Prefill] = {}
        self._budget: StepBudget | None = None
        self._cold_waited = False  # whether the last step had nothing for a cold prompt in line
        self._decode_width = 1 + self.num_spec_tokens
        self._report_interval_s = options.stats_interval_ms / 1000
        self._next_report = 0.0
        self._overlaps = self.parallel_config.pipeline_parallel_size > 1 or isinstance(self, AsyncScheduler)
        stock = "mode is 'stock'" if options.mode == "stock" else None
        budget_obstacle, order_obstacle = stock or compat.budget_obstacle(self), stock or compat.order_obstacle(self)
        self._cuts_prefills = budget_obstacle is None
        self._stock_limit = getattr(super(), compat.CHUNK_LIMIT)
        self._said = LogMessages(logger)
        self._lane: LaneConnectorScheduler | None = compat.lane_of(self)
        self._log = StepLog(self._controller, self._stats, self._lane.decoded if self._lane is not None else None)
        self._programs: ProgramTracker | None = None
        if options.policy != "fcfs" and order_obstacle is None:
            block_size, stages = int(self.cache_config.block_size), self.parallel_config.pipeline_parallel_size
            self._programs = ProgramTracker(options, self._controller, self._stats, block_size, stages > 1)
            self._stats.programs = self._programs.table
            self._log.stepped = self._programs.stepped
        self._admission = Admission(self, self._controller, self._stats, self._programs, self._said)
        self._queue: AgentQueue | None = None
        self._preempter: Preempter | None = None
        if order_obstacle is None:
            self._queue = AgentQueue(self._admission.key, options.bypass_steps, options.batch_bypass_steps)
            self.waiting = self._queue
            if self._programs is not None and options.program_preempt_share > 0:
                share = options.program_preempt_share
                self._preempter = Preempter(share, self, self._queue, self._admission, self._programs, self._stats)
        self._stats.tokens_left = lambda: tokens_left(self._prefills.values(), self._queue)
        self._to_lane: LaneLedger | None = None
        if self._lane is not None:
            self._to_lane = LaneLedger(self._lane, self._controller, self._stats, self._admission, self._programs)
        every_s = options.integrity_check_interval_s
        self.integrity = Integrity(self, lambda: self._prefills, self._queue, self._programs, self._lane, every_s)
        asynchronous, lanes = isinstance(self, AsyncScheduler), self._lane is not None
        self._said.startup(options, lanes, asynchronous, budget_obstacle, order_obstacle)

    # -- a step ---------------------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> "SchedulerOutput":
        started = perf_counter()
        if not self._prefills and not len(self.waiting) and not self.kv_holding_waiting:
            output = super().schedule(throttle_prefills)
            sequences = len(output.num_scheduled_tokens)
            context = self._decode_context() if sequences and self._log.wants_context() else 0
            self._log.scheduled(Step(output, started, sequences, context, beside_lane=self._beside_lane()))
            return output
        return self._schedule_with_prefills(throttle_prefills, started)

    def _schedule_with_prefills(self, throttle_prefills: bool, started: float) -> "SchedulerOutput":
        running = RequestStatus.RUNNING
        # Preempted prefills wait again; they are tagged anew when they are admitted.
        self._prefills = {key: prefill for key, prefill in self._prefills.items() if prefill.request.status == running}
        decodes = count_decodes(self.running, self._prefills, len(self._log) > 0 and not self._overlaps)
        context = self._decode_context() if decodes else 0
        if self._lane is not None:
            self._lane.decodes, self._lane.context = decodes, context
            if self._queue is not None and self._queue.parked:
                self._queue.release(self._lane.room, self._lane.filling)
        if self._queue is not None:
            self._queue.step = self.current_step
            self._stats.counts["overdue_requests"] += self._queue.promote_overdue()
            if self._programs is not None and self.current_step % DECIDE_STEPS == 0:
                self._queue.relevel(LOOK_AHEAD)
        if self._preempter is not None:
            self._preempter.before_step(self._prefills)
        self._budget = self._plan(decodes, context) if self._cuts_prefills else None
        # vLLM asks the attribute of the instance: so the question costs nothing in steps without prefill.
        setattr(self, compat.CHUNK_LIMIT, self._grant)
        try:
            output = super().schedule(throttle_prefills)
            if self._queue is not None:
                self._queue.stepped(output.total_num_scheduled_tokens < self.max_num_scheduled_tokens)
        finally:
            delattr(self, compat.CHUNK_LIMIT)
            if self._queue is not None:
                self._queue.closed = self._queue.colds_wait = False
            if self._preempter is not None:
                self._preempter.after_step()
        held = self._lane.take_held() if self._lane is not None else None
        if held and self._queue is not None:
            self._queue.park(held)
        chunks, admitted = self._take_chunks(output)
        sequences = len(output.num_scheduled_tokens) - len(chunks)
        beside = self._beside_lane()
        self._log.scheduled(Step(output, started, sequences, context, chunks or None, admitted, beside, self._budget))
        return output

    def _beside_lane(self) -> bool:  # whether the step that was just scheduled has part of the device only
        return self._lane is not None and self._lane.busy

    def _plan(self, decodes: int, context: int) -> StepBudget:
        prefills, queue = self._prefills.values(), self._queue
        most = max(self.max_num_scheduled_tokens - decodes * self._decode_width, 1)
        places, waits, beside = self.max_num_running_reqs - len(self.running), bool(self.waiting), self._beside_lane()
        budget = plan_step(self._controller, prefills, queue, decodes, context, most, places, waits, beside)
        if queue is not None:
            # A cold prompt may still be for the lane, unless one was found to be for steps, and to have to wait.
            for_lane = self._lane is not None and bool(self._lane.room) and not self._cold_waited
            queue.colds_wait = not for_lane and a_cold_prompt_goes_on(prefills, budget)
        self._cold_waited = False
        return budget

    def _grant(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Stands in for vLLM's own `CHUNK_LIMIT`: how many of these tokens run in this step."""
        prefill = self._prefills.get(request.request_id)
        if prefill is None:
            if request.status == RequestStatus.RUNNING:
                return self._stock_limit(request, num_computed_tokens, num_new_tokens)
            prefill = self._admit(request, num_computed_tokens)
        budget = self._budget
        if budget is not None and num_new_tokens > self._decode_width:
            obstacle = compat.cut_obstacle(self, request)
            if obstacle is not None:
                self._said.prefill_not_cut(obstacle)
                budget.charge(prefill.served_as, num_new_tokens, num_computed_tokens)
            else:
                wanted = num_new_tokens
                num_new_tokens = budget.grant(prefill.served_as, wanted, num_computed_tokens)
                if self._queue is not None and request.status != RequestStatus.RUNNING:
                    cold = prefill.served_as is Phase.COLD_PREFILL
                    self._cold_waited |= close_line(self._queue, request, cold, num_new_tokens, wanted)
        return self._stock_limit(request, num_computed_tokens, num_new_tokens)

    def _admit(self, request: Request, computed: int) -> Prefill:
        phase = self._to_lane.phase_of(request.request_id) if self._to_lane is not None else None
        if phase is None:
            phase = self._admission.phase(request, computed)
        short = phase is Phase.RESUME_PREFILL and request.num_tokens - computed <= self._controller.resume_tokens
        prefill = Prefill(request, phase, Phase.RESUME_PREFILL if short else Phase.COLD_PREFILL)
        self._prefills[request.request_id] = prefill
        return prefill

    def _take_chunks(self, output: "SchedulerOutput") -> tuple[list[tuple[Phase, int, int]], bool]:
        """Reads back which prefill chunks really run and whether one is the first of its prompt; counts admissions and
        forgets prefills that are through."""
        chunks = []
        cold_finished = False
        scheduled = output.num_scheduled_tokens
        new = {data.req_id for data in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        for request_id, prefill in list(self._prefills.items()):
            request = prefill.request
            tokens = scheduled.get(request_id, 0)
            if request.status != RequestStatus.RUNNING:
                del self._prefills[request_id]
                continue
            if request_id in new:
                self._stats.admitted(prefill.phase)
                if self._to_lane is not None:
                    self._to_lane.admitted(request.request_id)
            if tokens:
                before = request.num_computed_tokens - tokens
                if self._programs is not None and request_id in new:
                    self._programs.runs(request, before)
                chunks.append((prefill.phase, tokens, before))
                if self._programs is not None:
                    self._programs.computes(request, prefill.phase, tokens, before)
                if not request.is_prefill_chunk:
                    del self._prefills[request_id]
                    if self._programs is not None:
                        self._programs.table.decodes(request_id)
                    cold_finished |= prefill.phase is Phase.COLD_PREFILL
        if cold_finished and self._queue is not None:
            self._queue.retag(LOOK_AHEAD)
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
        if self.log_stats and (now >= self._next_report or not self.running):
            self._report(outputs, now)
        self.integrity.when_idle(self._stats, logger)
        return outputs

    def _report(self, outputs: dict[int, Any], now: float) -> None:
        """Lays our figures beside vLLM's own, which go to one of the API servers."""
        for output in outputs.values():
            if output.scheduler_stats is not None:
                setattr(output.scheduler_stats, STATS_FIELD, self._stats.take())
                self._next_report = now + self._report_interval_s
                return

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        if self._lane is not None:
            compat.drop_external_hits(self)
        return super().make_stats(*args, **kwargs)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_running_requests and self._lane is not None:
            # Blocks that the lane fills cannot be freed under it: its prompts wait again, as running ones do.
            compat.take_back(self, self._lane.drain() if self._lane.busy else set())
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    # -- waiting requests -----------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        self._admission.arrives(request)
        if self._queue is not None:
            self._queue.step = self.current_step  # quiet steps do not tell it
        super().add_request(request)
        if self._queue is not None and request in self._queue:
            self._stats.offered(self._queue.key(request.request_id).tokens)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if self._queue is not None:
            self._queue.step = self.current_step
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._admission.forget(request)
        self._prefills.pop(request.request_id, None)
        if self._to_lane is not None:
            self._to_lane.forget(request.request_id)
        if self._queue is not None:
            self._queue.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)


class AsyncAgentScheduler(AgentScheduler, AsyncScheduler):
    """AgentScheduler where vLLM schedules asynchronously (the default on CUDA)."""
