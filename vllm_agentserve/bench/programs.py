"""Programs drawn from a seed, for the simulator and for engines, and policies side by side in the simulator.

    python -m vllm_agentserve.bench.programs --shape mixed --programs 2000 --load 0.5 0.8 0.95

Load is the share of the time in which an engine that always has full batches would have work.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, get_args

from vllm_agentserve.bench.calls import CallShape, ProgramShape, in_blocks, scaled
from vllm_agentserve.bench.cost import SERVER_GPU, StepCost
from vllm_agentserve.bench.measure import quantiles
from vllm_agentserve.bench.simulated_calls import Ended
from vllm_agentserve.bench.simulator import Order, Simulator
from vllm_agentserve.policy.programs import ProgramTable

SLOTS = 32
STEP_TOKENS = 2048


def lognormal(rng: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    return min(max(round(rng.lognormvariate(0.0, sigma) * median), low), high)


def chat(rng: random.Random) -> tuple[CallShape, ...]:
    """A conversation: some turns, long answers, nobody thinks in between."""
    calls: list[CallShape] = []
    context = 0
    for turn in range(1 + min(int(rng.expovariate(1 / 2.5)), 20)):
        uncached, output = lognormal(rng, 120, 1.0, 8, 2000), lognormal(rng, 180, 0.9, 8, 1000)
        calls.append(CallShape(uncached, context, output, 0.0, (turn - 1,) if turn else ()))
        context += uncached + output
    return tuple(calls)


def tools(rng: random.Random) -> tuple[CallShape, ...]:
    """Function calling: about six turns, short answers, tools of about two seconds."""
    calls: list[CallShape] = []
    context = 0
    for turn in range(max(round(rng.gauss(6.3, 3.0)), 1)):
        uncached, output = (lognormal(rng, 150, 0.7, 16, 1500) if turn else 1500), lognormal(rng, 50, 0.5, 8, 200)
        tool_s = lognormal(rng, 1300, 0.9, 100, 15_000) / 1000 if turn else 0.0
        calls.append(CallShape(uncached, context, output, tool_s, (turn - 1,) if turn else ()))
        context += uncached + output
    return tuple(calls)


def search(rng: random.Random) -> tuple[CallShape, ...]:
    """Tree search: rounds of parallel attempts on one context, then a call that judges them all."""
    calls = [CallShape(1200, 0, 100)]
    context = 1300
    for _ in range(rng.randint(6, 14)):
        judge = len(calls) - 1
        attempts = range(len(calls), len(calls) + 5)
        calls += [CallShape(60, context, lognormal(rng, 150, 0.5, 20, 500), 0.0, (judge,)) for _ in attempts]
        calls.append(CallShape(800, context, 60, 0.3, tuple(attempts)))
        context += 860
    return tuple(calls)


def mixed(rng: random.Random) -> tuple[CallShape, ...]:
    """Many short programs beside few long ones."""
    return rng.choices((chat, tools, search), weights=(0.45, 0.4, 0.15))[0](rng)


SHAPES: dict[str, Callable[[random.Random], tuple[CallShape, ...]]] = {
    "chat": chat,
    "tools": tools,
    "search": search,
    "mixed": mixed,
}


def draw_programs(
    shape: str,
    number: int,
    load: float,
    cost: StepCost,
    slots: int,
    seed: int,
    scale: float = 1.0,
    block: int = 1,
) -> list[ProgramShape]:
    """So many programs that arrive at random, as fast as the load says; the same ones for every load, sooner or later.

    Args:
        shape: one of `SHAPES`.
        load: share of the time in which an engine of this cost, its slots always full, would have work.
        scale: factor on lengths and tool times.
        block: tokens per block of the prefix cache; only the load depends on it, `in_blocks` does the rest.
    """
    rng = random.Random(f"{shape} {seed}")
    drawn = [SHAPES[shape](rng) for _ in range(number)]
    if scale != 1.0:
        drawn = [scaled(calls, scale) for calls in drawn]
    work_ms = [sum(cost.call_ms(call, slots) for call in in_blocks(calls, block)) for calls in drawn]
    work_s = statistics.fmean(work_ms) / 1000
    arrival, programs = 0.0, []
    for index, calls in enumerate(drawn):
        arrival += rng.expovariate(load / work_s)
        programs.append(ProgramShape(f"{shape}-{index}", arrival, calls))
    return programs


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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_agentserve.bench.programs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="mixed")
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--quantum-ms", type=float, default=500.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", type=json.loads, default={}, help="coefficients of StepCost that differ, as JSON")
    given = parser.parse_args()
    cost = StepCost(**{**vars(SERVER_GPU), **given.cost})
    print("| load | policy | mean ms/token | p50 | p95 | p99 | longest program s | mean, stock over policy |")
    print("|---" * 8 + "|")
    for load in given.load:
        programs = draw_programs(given.shape, given.programs, load, cost, given.slots, given.seed)
        found: dict[str, dict[str, Any]] = {}
        for order in get_args(Order):
            found[order] = figures(simulate(order, programs, cost, given.slots, given.quantum_ms))
            cells = [f"{found[order][key]:.1f}" for key in ("mean", "p50", "p95", "p99", "longest s")]
            ratio = found["stock"]["mean"] / found[order]["mean"]
            print(f"| {load:g} | {order} | " + " | ".join(cells) + f" | x{ratio:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
