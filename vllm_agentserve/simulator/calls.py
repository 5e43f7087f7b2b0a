"""A program and a request on their way through the simulator, and what is left of a program when it has ended."""

from dataclasses import dataclass, field

from vllm_agentserve.bench.calls import CallShape, ProgramShape, program_walk
from vllm_agentserve.bench.walk import Walk


@dataclass
class Ended:
    """A program that has ended.

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
    """A program under way: calls ended, ends of calls, and what is left of it for the oracle."""

    shape: ProgramShape
    left_ms: float
    ends: dict[int, tuple[float, int]] = field(default_factory=dict)
    """By call: the path to its end, and the number of that, as the program table counts them; 0 without one."""
    served: int = 0
    walk: Walk[int] = field(init=False)
    """Its calls by index, and what each of them waits for."""

    def __post_init__(self) -> None:
        self.walk = program_walk(self.shape.calls)


@dataclass(eq=False)
class SimulatedRequest:
    """One call of a program, with the attributes of vLLM's request that the policy reads.

    Args:
        live: its program.
        index: which of the program's calls it is.
        before: the call it goes on from; None: none.
        session_id: None where the scheduler is not to know that its session has run before.
    """

    live: Live
    index: int
    before: int | None
    session_id: str | None
    num_computed_tokens: int = field(init=False)
    output: int = field(init=False)
    """Tokens still to be decoded."""

    def __post_init__(self) -> None:
        self.num_computed_tokens = self.shape.context
        self.output = self.shape.output

    @property
    def shape(self) -> CallShape:
        return self.live.shape.calls[self.index]

    @property
    def request_id(self) -> str:
        return f"{self.live.shape.name}/{self.index}"

    @property
    def num_tokens(self) -> int:
        return self.shape.context + self.shape.uncached

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_tokens
