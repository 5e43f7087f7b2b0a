"""An engine without vLLM: step times as measured on two cores with the toy model, with noise, for the policy tests."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.phase import Phase


@dataclass
class SimulatedEngine:
    """Runs cold prefills of given lengths beside `sequences` decodes and tells the controller what each step took.

    Times in ms; coefficients per thousand tokens.
    """

    controller: BudgetController
    base: float = 4.7
    per_sequence: float = 0.1
    per_chunk_context: float = 0.44
    per_token: float = 43.0
    per_token_context: float = 30.0
    noise: float = 0.08
    hiccup: float = 0.0
    admission: float = 4.0
    seed: int = 0
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def true_ms(self, sequences: int, tokens: int, context: int) -> float:
        p, c = tokens / 1000, (context + tokens) / 1000
        total = self.base + self.per_sequence * sequences
        if tokens:
            total += self.per_chunk_context * c + self.per_token * p + self.per_token_context * p * (c - p / 2)
        return total

    def measured_ms(self, sequences: int, tokens: int, context: int) -> float:
        factor = max(self.rng.gauss(1.0, self.noise), 0.5)
        extra = self.rng.uniform(20, 100) if self.rng.random() < self.hiccup else 0.0
        return self.true_ms(sequences, tokens, context) * factor + extra

    def decode(self, steps: int, sequences: int = 4, context: int = 2000) -> None:
        for _ in range(steps):
            took = self.measured_ms(sequences, 0, 0)
            self.controller.observe(took, took, sequences, context, None)

    def cold_prefill(self, prompt: int, sequences: int = 4, context: int = 2000) -> Iterator[tuple[float, int, int]]:
        """Yields (duration in ms, chunk, context before it) of every step until the prompt is computed."""
        done = 0
        while done < prompt:
            budget = self.controller.plan(sequences, context, 4096, colds=True, admits=not done)
            tokens = budget.grant(Phase.COLD_PREFILL, prompt - done, done)
            assert tokens > 0, "a cold prefill stood still"
            took = self.measured_ms(sequences, tokens, done)
            took += 0.0 if done else self.admission
            interval = took if sequences else None
            self.controller.observe(took, interval, sequences, context, budget.granted, admitted=not done)
            yield took, tokens, done
            done += tokens
