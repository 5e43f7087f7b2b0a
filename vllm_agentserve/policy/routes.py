"""Which lane a prompt takes, decided once, at admission, with the reason."""

import enum
from dataclasses import dataclass


class Route(enum.Enum):
    """Where a prompt is computed."""

    STEP = "in vLLM's own steps"
    LANE = "by the prefill lane"
    HOLD = "by the prefill lane, when it has room"


class Reason(enum.Enum):
    """Why; the values name the counters of `/metrics`."""

    INELIGIBLE = "step_ineligible_requests"
    SHORT = "step_short_requests"
    NO_DECODES = "step_no_decodes_requests"
    LANE_DOWN = "step_lane_down_requests"
    STEP_FASTER = "step_faster_requests"
    UNMEASURED = "step_unmeasured_requests"
    LANE_FULL = "step_lane_full_requests"
    LANE_FASTER = "lane_faster_requests"
    FORCED = "lane_forced_requests"


@dataclass(frozen=True)
class Prompt:
    """What the decision knows of a prompt.

    Args:
        uncached: tokens to compute.
        eligible: whether the lane can compute it at all.
        step_rate: tokens per second that mixed steps within the target would read of it; None before any has been seen.
        lane_rate: tokens per second that the lane would; None before any has been seen.
    """

    uncached: int
    eligible: bool = True
    step_rate: float | None = None
    lane_rate: float | None = None


@dataclass
class LanePolicy:
    """Decides the route of every prompt.

    The lane pays only while somebody decodes: a prompt that nobody is beside is computed by vLLM's own steps on the whole
    device, and short ones are cheaper in a step than in a lane with part of it.

    When both would keep the target, the faster one reads the prompt. A mixed step on the whole device wastes nothing, but
    of a target T it gives prefill only T minus the decodes' own time; the lane gives prefill its share of the device for all
    of the time. So a loose target belongs to steps and a tight one to the lane, and where between them the border lies is
    measured: both rates are.

    Args:
        min_tokens: shortest uncached prompt for the lane.
        jobs: prompts that may hold KV blocks for the lane at once.
        compares: False sends every long prompt to the lane (mode `lanes`), True the ones it reads faster (mode `auto`).
    """

    LANE_BONUS = 1.1
    """Beside the lane streams run at their own pace instead of at the target's: worth a tenth of the rate."""

    min_tokens: int
    jobs: int
    compares: bool = False
    ready: bool = True

    def route(self, prompt: Prompt, decodes: int, in_flight: int, waited: bool = False) -> tuple[Route, Reason]:
        """Args: the prompt, streams that decode, jobs the lane has, and whether the prompt has waited for room too long."""
        if prompt.uncached < self.min_tokens:
            return Route.STEP, Reason.SHORT
        if not prompt.eligible:
            return Route.STEP, Reason.INELIGIBLE
        if not decodes:
            return Route.STEP, Reason.NO_DECODES
        if not self.ready:
            return Route.STEP, Reason.LANE_DOWN
        reason = self._compare(prompt) if self.compares else Reason.FORCED
        if reason in (Reason.STEP_FASTER, Reason.UNMEASURED):
            return Route.STEP, reason
        if in_flight < self.jobs:
            return Route.LANE, reason
        return (Route.STEP, Reason.LANE_FULL) if waited else (Route.HOLD, reason)

    def _compare(self, prompt: Prompt) -> Reason:
        if prompt.step_rate is None or prompt.lane_rate is None:
            return Reason.UNMEASURED
        faster = prompt.lane_rate * self.LANE_BONUS >= prompt.step_rate
        return Reason.LANE_FASTER if faster else Reason.STEP_FASTER

    def failed(self) -> None:
        """The lane failed: nothing is sent to it until it is `started` again."""
        self.ready = False

    def started(self) -> None:
        """A lane says that it is ready."""
        self.ready = True


def lanes_may_pay(factor: float | None, prefill_share: float) -> bool:
    """Whether a lane can ever read a prompt faster than mixed steps within a target of `factor` times the quiet step.

    Decided at start, before anything is measured: steps give prefill at most (factor - 1) / factor of the time, less what
    mixing costs, about half a quiet step where it was measured; the lane has `prefill_share` of the device, in (0, 1).

    Args:
        factor: of a calibrated target; None when the target is given in ms, which says nothing before steps are measured.
        prefill_share: of the largest prefill slot.
    """
    if factor is None:
        return True
    return prefill_share * LanePolicy.LANE_BONUS >= (factor - 1.5) / factor
