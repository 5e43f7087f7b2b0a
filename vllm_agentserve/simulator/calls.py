"""A program and a call on their way through the simulator, and what is left of a program when it is through."""

from dataclasses import dataclass, field

from vllm_agentserve.bench.calls import CallShape, ProgramShape
from vllm_agentserve.policy.phase import Phase


@dataclass
class Ended:
    """A program that is through.

    Args:
        seconds: from its arrival to the end of its last call.
        tokens: decoded.
        tools_s: longest chain of its tool times, which no scheduler can shorten.
        ended_s: when it ended.
    """

    name: str
    seconds: float
    tokens: int
    tools_s: float
    ended_s: float = 0.0

    @property
    def per_token_s(self) -> float:
        return self.seconds / self.tokens


@dataclass
class Live:
    """A program that is not through: calls ended, ends of calls, and what is left of it for the oracle."""

    shape: ProgramShape
    left_ms: float
    ends: dict[int, tuple[float, int]] = field(default_factory=dict)
    """By call: the path to its end, and the number of that, as the program table counts them; 0 without one."""
    served: int = 0


@dataclass
class Call:
    live: Live
    index: int
    number: int
    prefill: int
    output: int
    phase: Phase = Phase.COLD_PREFILL
    served_as: Phase = Phase.COLD_PREFILL

    @property
    def shape(self) -> CallShape:
        return self.live.shape.calls[self.index]

    @property
    def name(self) -> str:
        return f"{self.live.shape.name}/{self.index}"

    @property
    def computed(self) -> int:
        """Tokens of the prompt that are there."""
        return self.shape.context + self.shape.uncached - self.prefill
