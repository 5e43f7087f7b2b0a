"""The scheduler's half of the connector: who goes to the lane, which blocks it fills, and how the device is divided."""

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Protocol

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.lane import LaneReport, Slot
from vllm_agentserve.policy.call import Call, Chunk
from vllm_agentserve.policy.jobs import Drained, Job
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.preemption import Rank
from vllm_agentserve.policy.routes import LanePolicy, Prompt, Reason, Route
from vllm_agentserve.policy.slots import LaneRate, SlotChooser
from vllm_agentserve.vllm_compat.lanes import lane_obstacle, local_worker_half

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Rates(Protocol):
    """What steps would read of a prompt, as `BudgetController` knows it."""

    @property
    def target_ms(self) -> float: ...

    def prefill_rate(self, sequences: int, context: int, tokens: int, before: int) -> float | None: ...

    def device_rate(self, tokens: int, before: int) -> float | None: ...


class Policy(Protocol):
    """What the lane asks of `EnginePolicy`."""

    def phase(self, call: Call, computed: int) -> Phase: ...

    def rank(self, call: Call) -> Rank: ...


class LaneConnectorScheduler:
    """What it knows of a request stands in that request's `Call.lane`.

    Args:
        options: mode and limits.
        block_size: tokens per KV block.
        calls: by id of the request, from arrival to end.
        policy: tells what a prompt is, and its rank.
        rates: of steps.
        on_dispatch: is called for every prompt that goes to the lane, with all that the lane computes of it as one chunk.
        on_failure: is called for every prompt on which the lane failed.
        on_offer: is called for every prompt that is to go to the lane, with its cached tokens, before vLLM looks for its blocks.

    Before every step `decodes` and `context` are set.
    """

    def __init__(
        self,
        options: AgentServeConfig,
        block_size: int,
        calls: Mapping[str, Call],
        policy: Policy,
        rates: Rates,
        on_dispatch: Callable[[Call, Chunk], None],
        on_failure: Callable[[], None],
        on_offer: Callable[[Call, int], None],
    ) -> None:
        self.policy = LanePolicy(options.lane_min_tokens, options.lane_max_requests, compares=options.mode == "auto")
        # Until the worker says that there is one: in mode `auto` there may be none.
        self.policy.ready = False
        self.block_size = block_size
        self.rates = rates
        self._calls = calls
        self._calls_policy = policy
        self._on_dispatch = on_dispatch
        self._on_failure = on_failure
        self._on_offer = on_offer
        self.decodes = 0
        self.context = 0
        self.rate: LaneRate | None = None
        """None until the worker has said how its device is divided."""
        self.launches, self.launch_s = 0, 0.0
        """Chunks that the worker launched beside decodes itself, and the seconds that took its thread."""
        self.memory: dict[str, int] = {}
        """Bytes by stream of the lane."""
        self._slots: tuple[Slot, ...] = ()
        self._chooser: SlotChooser | None = None
        self._new: list[Job] = []
        self.in_flight: list[Call] = []
        """Calls whose prompts are on their way or under way, ended ones too until the worker says that their jobs have ended."""
        self._taken_back: set[str] = set()
        """Requests that do not wait for their jobs any more, though the report of how these ended is still on its way."""
        self.drain_worker: Callable[[], Drained] | None = None
        """Takes back every job of a worker in another process, as `drain`; None where it cannot be asked."""
        self._held: dict[Call, Hashable | None] = {}
        self.filling: set[Hashable] = set()
        """Hashes of the blocks the lane is filling: who needs one of them waits, and then finds it in the prefix cache."""

    @property
    def busy(self) -> bool:
        """Whether jobs are on their way or under way."""
        return bool(self.in_flight)

    @property
    def slot(self) -> int:
        return self._chooser.slot if self._chooser is not None else 0

    @property
    def target_ms(self) -> float:
        """Of a step, from the budget."""
        return self.rates.target_ms

    @property
    def tokens_per_s(self) -> float:
        """What the lane computes beside decodes; 0 until it has."""
        return (self.rate.tokens_per_s(None) if self.rate is not None else None) or 0.0

    def matched(self, request: "Request", computed: int) -> tuple[int | None, bool]:
        """What vLLM asks at admission: (tokens the lane will compute, True), (0, False) for a step, (None, False) to wait."""
        call = self._calls[request.request_id]
        uncached = request.num_tokens - 1 - computed
        if self.filling and uncached > 0:
            block = computed // self.block_size
            if block < len(request.block_hashes) and request.block_hashes[block] in self.filling:
                self._held[call] = request.block_hashes[block]
                return None, False
        prompt = self._prompt(request, uncached, computed)
        if call.lane.failed and uncached > 0:
            call.lane.reason = Reason.LANE_DOWN
            return 0, False
        route, reason = self.policy.route(prompt, self.decodes, len(self.in_flight), call.has_waited)
        if route is Route.HOLD:
            self._held[call] = None
            return None, False
        call.lane.reason = reason
        if route is not Route.LANE:
            return 0, False
        self._on_offer(call, computed)
        return uncached, True

    def _prompt(self, request: "Request", uncached: int, computed: int) -> Prompt:
        fit = lane_obstacle(request) is None
        if not self.policy.compares or uncached < self.policy.min_tokens or self.rate is None:
            return Prompt(uncached, fit)
        return Prompt(
            uncached,
            fit,
            self.rates.prefill_rate(self.decodes, self.context, uncached, computed),
            self.rate.tokens_per_s(self.rates.device_rate(uncached, computed)),
        )

    def dispatch(self, request: "Request", block_ids: tuple[list[int], ...], tokens: int) -> None:
        call = self._calls[request.request_id]
        start = request.num_tokens - 1 - tokens
        phase = self._calls_policy.phase(call, start)
        self._new.append(
            Job(
                request.request_id,
                list(request.all_token_ids),
                block_ids,
                start,
                resume=phase is Phase.RESUME_PREFILL,
                rank=self._calls_policy.rank(call),
            )
        )
        # Whole blocks only: the last one gets its last token in vLLM's own step.
        hashes = tuple(request.block_hashes[start // self.block_size : (start + tokens) // self.block_size])
        call.lane.phase, call.lane.start, call.lane.hashes = phase, start, hashes
        self.in_flight.append(call)
        self.filling.update(hashes)
        if request.prefill_stats is not None and request.num_preemptions <= 0:
            # vLLM takes them for found elsewhere; they are computed, and no client is told otherwise.
            request.prefill_stats.set(request.num_prompt_tokens, min(start, request.num_prompt_tokens), 0)
        self._on_dispatch(call, Chunk(phase, tokens, start))

    def drain(self) -> tuple[Drained, set[str]]:
        """Takes every job back. Returns what became of them, and the requests whose jobs have ended while the report of that is
        on its way: with asynchronous scheduling it comes with a step that is still under way. When these have been told,
        `taken_back` is to be called for them.

        Raises:
            RuntimeError: the worker is in another process and cannot be asked.
        """
        if not self.busy:
            return Drained(), set()
        worker = local_worker_half()
        if worker is not None:
            drained = worker.drain()
        elif self.drain_worker is not None:
            drained = self.drain_worker()
        else:
            raise RuntimeError(
                f"{len(self.in_flight)} prompts are in the prefill lane of a worker in another process: call again when they "
                "have ended, or serve in mode 'time-sliced'"
            )
        sent = {call.name for call in self.in_flight}
        return drained, sent - drained.ended - drained.left

    def taken_back(self, late: set[str]) -> None:
        """The report on these jobs is still on its way, and means nothing any more when it comes."""
        self._taken_back |= late

    def still_wanted(self, finished: set[str]) -> set[str]:
        """Of the jobs that are reported as ended, those whose requests wait for that. Reports come in the order of the steps, so
        the next one about a request that was taken back is the old one."""
        late = finished & self._taken_back
        self._taken_back -= late
        return finished - late

    def take_held(self) -> dict[Call, Hashable | None]:
        """The calls held back since the last call, and what each waits for: the hash of a block, None for room."""
        held, self._held = self._held, {}
        return held

    @property
    def room(self) -> int | None:
        """How many prompts the lane can take; None where it takes none, so that nobody is held back for it."""
        if not self.policy.ready or not self.decodes:
            return None
        return max(self.policy.jobs - len(self.in_flight), 0)

    def take_new(self) -> list[Job]:
        new, self._new = self._new, []
        return new

    def ended(self, finished: set[str], failed: set[str]) -> None:
        if finished:
            for call in [call for call in self.in_flight if call.name in finished]:
                call.lane.failed |= call.name in failed
                self.in_flight.remove(call)
                call.lane.start, call.lane.hashes = None, ()
            # A prefix may be in two jobs when its first block was in nobody's: rebuilt, for there are few jobs.
            self.filling = {one for call in self.in_flight for one in call.lane.hashes}
        if failed:
            self.policy.failed()
            for _ in failed:
                self._on_failure()

    def reported(self, report: LaneReport) -> None:
        """Takes in what the worker says of its lane."""
        if report.down:
            self.policy.failed()
        if report.slots:
            self.policy.started()
            if report.new and self.rate is not None:
                self.rate.renew()
        if report.slots and report.slots != self._slots:
            self._slots = report.slots
            self._chooser = SlotChooser([slot.decode for slot in report.slots])
            largest = report.slots[-1]
            self.rate = LaneRate(largest.prefill / (largest.decode + largest.prefill))
        if self.rate is not None:
            self.rate.report(report.tokens, report.seconds)
        self.launches += report.launches
        self.launch_s += report.launch_s
        self.memory |= dict(report.memory)

    def decided(self, reason: Reason) -> None:
        """A prompt was admitted, and goes where it goes for this reason."""
        if reason is Reason.STEP_FASTER and self.rate is not None:
            self.rate.passed_over()

    def decoded(self, interval_ms: float) -> None:
        """Takes in the time between two tokens of the streams beside the working lane; divides the device anew."""
        if self._chooser is not None:
            self._chooser.observe(interval_ms)
            self._chooser.choose(self.rates.target_ms)
