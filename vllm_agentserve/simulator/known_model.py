"""The step-time model of a machine whose cost is known."""

from collections.abc import Sequence

from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.policy.call import Chunk
from vllm_agentserve.policy.latency import StepModel


class KnownModel(StepModel):
    """The step-time model of a machine whose cost is known: it says what steps take, and has nothing to learn."""

    def __init__(self, cost: StepCost) -> None:
        super().__init__()
        self._cost = cost

    @property
    def knows_prefill(self) -> bool:
        return True

    def decode_ms(self, sequences: int, context: int) -> float:
        return self._cost.decode_ms(sequences, context)

    def learn_decode(self, sequences: int, context: int, duration_ms: float) -> None:
        pass

    def learn_prefill(self, sequences: int, context: int, chunks: Sequence[Chunk], duration_ms: float) -> float:
        return self.step_ms(sequences, context, chunks)

    def chunk_ms(self, tokens: int, context: int, first: bool = True) -> float:
        return self._cost.chunk_ms(tokens, context) + (self._cost.prefill if first else 0.0)

    def _coefficients(self) -> list[float]:
        # Attention per chunk is counted from its beginning here and from its end there: the same thing.
        return [self._cost.prefill, 0.0, self._cost.tokens, self._cost.attended]
