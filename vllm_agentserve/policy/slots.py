"""Which lane a prompt takes, and which cores each lane has."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Route(enum.Enum):
    """Where a prompt is computed."""

    STEP = "in vLLM's own steps"
    LANE = "by the prefill lane"
    HOLD = "by the prefill lane, when it has room"


@dataclass
class LanePolicy:
    """Decides the route of every prompt at admission.

    The lane pays only while somebody decodes: a prompt that nobody is beside is computed by vLLM's own steps on the whole
    device, and short ones are cheaper in a step than in a lane of few cores.

    Args:
        min_tokens: shortest uncached prompt for the lane.
        jobs: prompts that may hold KV blocks for the lane at once.
        restarts: failures of the lane after which it is given up.
        retry_s: how long nothing is sent to a lane that failed, in seconds.
    """

    min_tokens: int
    jobs: int
    restarts: int
    retry_s: float = 20.0
    failures: int = 0
    _down_until: float = 0.0

    def route(self, uncached: int, decodes: int, in_flight: int, now: float) -> Route:
        """Args: uncached tokens of the prompt, streams that decode, jobs the lane has, and the time in seconds."""
        if uncached < self.min_tokens or not decodes or not self.up(now):
            return Route.STEP
        return Route.LANE if in_flight < self.jobs else Route.HOLD

    def up(self, now: float) -> bool:
        return self.failures <= self.restarts and now >= self._down_until

    def failed(self, now: float) -> None:
        """The lane failed: it is being started again, or given up."""
        self.failures += 1
        self._down_until = now + self.retry_s


def split_cores(cores: Sequence[int]) -> tuple[list[int], list[int]]:
    """The cores of the decode lane and of the prefill lane while both have work: decode keeps the larger half.

    Raises:
        ValueError: fewer than two cores.
    """
    if len(cores) < 2:
        raise ValueError(f"two lanes need two cores, there is {len(cores)}")
    cut = (len(cores) + 1) // 2
    return list(cores[:cut]), list(cores[cut:])
