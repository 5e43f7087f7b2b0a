"""Policies side by side in the simulator.

    python -m vllm_agentserve.simulator --shape mixed --programs 2000 --load 0.5 0.8 0.95

Load is the share of the time in which an engine that always has full batches would have work.
"""

import argparse
import json
from typing import Any, get_args

from vllm_agentserve.bench.cost import SERVER_GPU, StepCost
from vllm_agentserve.bench.programs import KINDS, SLOTS, draw_programs
from vllm_agentserve.simulator.policies import figures, simulate
from vllm_agentserve.simulator.simulator import Order


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_agentserve.simulator", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(KINDS), default="mixed")
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
