"""One policy on given programs in the simulator, and the figures of what came out."""

import statistics
from collections.abc import Sequence

from vllm_agentserve.bench.calls import ProgramShape
from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.bench.measure import quantiles
from vllm_agentserve.bench.programs import SLOTS
from vllm_agentserve.policy.programs import ProgramTable
from vllm_agentserve.simulator.calls import Ended
from vllm_agentserve.simulator.simulator import Order, Simulator

STEP_TOKENS = 2048


def simulate(
    order: Order,
    programs: Sequence[ProgramShape],
    cost: StepCost,
    slots: int = SLOTS,
    quantum_ms: float = 500.0,
    step_tokens: int = STEP_TOKENS,
    told: bool = True,
) -> list[Ended]:
    """One policy on these programs; see `Simulator`."""
    table = ProgramTable(order, quantum_ms=quantum_ms) if order in ("plas", "atlas") else None
    return Simulator(order, cost, slots, step_tokens, table, told).run(programs)


def figures(ended: Sequence[Ended]) -> dict[str, float]:
    """Completion time per token of programs in ms, as Autellix counts it: mean and quantiles; the longest program and the
    time until all were through in s."""
    per_token = [one.per_token_s * 1000 for one in ended]
    shares = quantiles(per_token)
    last = max(one.seconds for one in ended)
    return {
        "mean": statistics.fmean(per_token),
        **{name: shares[name] for name in ("p50", "p95", "p99")},
        "longest s": last,
        "makespan s": max(one.ended_s for one in ended),
    }
