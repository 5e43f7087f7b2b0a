"""What a step costs: the coefficients of one machine and model."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vllm_agentserve.bench.calls import CallShape
from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.options import read_json

MOST_MS = 1e9
"""No coefficient is larger."""


@dataclass(frozen=True)
class StepCost:
    """Durations in ms: a step, plus per sequence, per thousand tokens of context; a chunk per thousand tokens and per
    thousand tokens times thousand tokens attended to; what a step with chunks takes by itself over one without."""

    base: float
    sequence: float
    context: float
    tokens: float
    attended: float
    prefill: float = 0.0

    def decode_ms(self, sequences: int, context: float) -> float:
        return self.base + self.sequence * sequences + self.context * context / 1000 if sequences else 0.0

    def chunk_ms(self, tokens: int, before: int) -> float:
        """What a chunk adds to a step that has one already."""
        return (self.tokens + self.attended * (before + tokens / 2) / 1000) * tokens / 1000

    def step_ms(self, sequences: int, context: float, chunks: Sequence[tuple[int, int]]) -> float:
        """A step with these decodes (their number and summed context) and chunks (tokens, tokens before)."""
        prompts = self.prefill + sum(self.chunk_ms(*chunk) for chunk in chunks) if chunks else 0.0
        return (self.decode_ms(sequences, context) or self.base) + prompts

    def call_ms(self, call: CallShape, sequences: int) -> float:
        """Engine time of a call in a batch of so many sequences."""
        each = self.decode_ms(sequences, sequences * (call.context + call.uncached)) / sequences
        return self.prefill + self.chunk_ms(call.uncached, call.context) + call.output * each


SERVER_GPU = StepCost(base=12.0, sequence=0.15, context=0.02, tokens=60.0, attended=1.5)
"""About an 8B model on one server GPU: 12 ms a step, 60 ms per thousand prompt tokens. Not measured by us."""
TOY_CPU = StepCost(base=6.5, sequence=0.3, context=0.6, tokens=120.0, attended=40.0, prefill=2.0)
"""An estimate for the toy model behind `vllm serve` on two cores, which API server and client share. The engine by itself was
measured at 5.0, 0.0, 0.48, 50, 31 and 1.0."""


def read_cost(path: Path) -> StepCost:
    """Reads what `python -m vllm_agentserve.simulator.agreement` writes in a clone: an object with the coefficients, or one under
    `cost`.

    Raises:
        WorkloadError: there is no such file, or a coefficient is missing, unknown or no number from 0.
    """
    try:
        given = read_json(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkloadError(f"--step-cost {path} cannot be read as JSON: {error}") from error
    given = given.get("cost", given) if isinstance(given, dict) else given
    names = [field.name for field in fields(StepCost)]
    needed = names[:-1]
    if not isinstance(given, dict) or not set(needed) <= given.keys() <= set(names):
        raise WorkloadError(f"--step-cost {path} must hold an object with {', '.join(needed)} and perhaps {names[-1]}")
    for name, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value <= MOST_MS or (name in ("base", "tokens") and value == 0):
            kind = "above 0" if name in ("base", "tokens") else "from 0"
            raise WorkloadError(
                f"--step-cost {path}: {name!r} = {value!r} is not allowed: it must be a number {kind} to {MOST_MS:g}"
            )
    return StepCost(**given)


def write_cost(path: Path, cost: StepCost) -> None:
    path.write_text(json.dumps({name: round(value, 4) for name, value in asdict(cost).items()}, indent=1) + "\n")
