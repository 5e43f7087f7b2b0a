"""The prefill lane as the scheduler sees it: which prompts it gets, what is counted of them, and who waits for it."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.connector_scheduler import LaneConnectorScheduler
from vllm_agentserve.policy.call import Call, Chunk
from vllm_agentserve.policy.engine import EnginePolicy
from vllm_agentserve.policy.waiting import lane_takes
from vllm_agentserve.scheduler.features import Feature
from vllm_agentserve.vllm_compat import scheduler as compat
from vllm_agentserve.vllm_compat.control import guard_control_calls
from vllm_agentserve.vllm_compat.integrity import writing_faults

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


class NoLaneFeature(Feature):
    """Steps compute every prompt. Also what the scheduler asks of a lane."""

    busy = False
    """Whether the lane has part of the device."""
    has_room = False
    """Whether it can take a prompt."""


class LaneFeature(NoLaneFeature):
    """Follows what `LaneConnectorScheduler` decides.

    Args:
        options: mode and limits.
        scheduler: whose requests it dispatches, and whose connector it serves.
        policy: tells the phase of a prompt and its rank, and knows rates.
        calls: by id of the request.
        counts: of prompts, tokens, failures and reasons.
        asked: vLLM is about to look for KV blocks for a prompt that goes to the lane, of which so many tokens are cached.
    """

    def __init__(
        self,
        options: AgentServeConfig,
        scheduler: "Scheduler",
        policy: EnginePolicy,
        calls: Mapping[str, Call],
        counts: MutableMapping[str, float],
        asked: Callable[[Call, int], None],
    ) -> None:
        block_size = int(scheduler.cache_config.block_size)
        self.dispatch = LaneConnectorScheduler(
            options, block_size, calls, policy, policy.controller, self.dispatched, self.failed, asked
        )
        compat.serve_lane_connector(scheduler, self.dispatch)
        guard_control_calls()
        self._scheduler = scheduler
        self._policy = policy
        self._counts = counts

    @property
    def busy(self) -> bool:  # type: ignore[override]
        return self.dispatch.busy

    @property
    def has_room(self) -> bool:  # type: ignore[override]
        return bool(self.dispatch.room)

    def before_step(self, decodes: int, context: int) -> None:
        dispatch, waiting = self.dispatch, self._policy.waiting
        dispatch.decodes, dispatch.context = decodes, context
        if waiting.parked:
            waiting.release(lane_takes(dispatch.room, dispatch.filling))

    def after_schedule(self) -> None:
        compat.drop_external_hits(self._scheduler)
        held = self.dispatch.take_held()
        if held:
            self._policy.waiting.park(held)

    def dispatched(self, call: Call, chunk: Chunk) -> None:
        """A prompt goes to the lane, which computes it up to its last token."""
        self._counts["lane_requests"] += 1
        self._counts["lane_tokens"] += chunk.tokens
        self._count_reason(call)
        self._policy.lane_computes(call, chunk)

    def failed(self) -> None:
        self._counts["lane_failed_requests"] += 1

    def admitted(self, call: Call) -> None:
        """A step computes the prompt, or what the lane left of it."""
        call.lane.phase = None
        self._count_reason(call)

    def _count_reason(self, call: Call) -> None:
        """Counts why a prompt goes where it goes, once; one that nobody asked about resumes after a preemption."""
        reason, call.lane.reason = call.lane.reason, None
        if reason is not None:
            self._counts[reason.value] += 1
            self.dispatch.decided(reason)

    def finished(self, sequences: int, interval_ms: float | None, chunks: Iterable[Chunk], beside_lane: bool) -> None:
        if beside_lane and interval_ms is not None and not chunks:
            self.dispatch.decoded(interval_ms)

    def before_reset(self) -> None:
        # Blocks that the lane fills cannot be freed under it: its prompts wait again, as running ones do.
        drained, late = self.dispatch.drain()
        if drained.left:
            # They were to be cancelled; what is left of them comes with a step.
            compat.take_back(self._scheduler, drained.ended)
            raise RuntimeError(
                f"the prefill lane has not let go of {len(drained.left)} prompts in time, so the prefix cache is not reset under "
                "running requests, which go on. Try again in a moment."
            )
        compat.take_back(self._scheduler, drained.ended | late)
        self.dispatch.taken_back(late)

    def report(self) -> dict[str, float]:
        lane = self.dispatch
        self._counts["lane_launches"], self._counts["lane_launch_seconds"] = lane.launches, lane.launch_s
        gauges = {"lane_tokens_per_second": lane.tokens_per_s, "lane_slot": float(lane.slot)}
        return gauges | {f"lane_memory_bytes:{stream}": size for stream, size in lane.memory.items()}

    def faults(self, calls: Iterable[Call]) -> list[str]:
        known, writing = self._scheduler.requests, self.dispatch.in_flight
        found = [f"{call.name!r} is in the lane, and is gone" for call in writing if call.name not in known]
        return found + writing_faults(self._scheduler, {call.name: call.lane.start or 0 for call in writing})
