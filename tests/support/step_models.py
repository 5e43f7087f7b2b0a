"""Models of step times that the tests' tables count with."""

from vllm_agentserve.policy.latency import StepModel


class FlatModel(StepModel):
    """0.1 ms per token, whatever the context."""

    def chunk_ms(self, tokens: int, context: int, first: bool = True) -> float:
        return 0.1 * tokens

    def tokens_within(self, budget_ms: float, context: int, first: bool = True) -> int:
        return max(int(budget_ms * 10 + 1e-6), 0)
