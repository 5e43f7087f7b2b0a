"""Critical programs in the simulator, with and without space of their own: `python -m … --output FILE`.

Writes a JSON file with all figures, and tables beside it. Everything is drawn from seeds: the same command gives the same
figures.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from vllm_agentserve.policy.retention import Retention
from vllm_agentserve.policy.space import MOST, Space
from vllm_agentserve.simulator.arm_tables import arm_tables
from vllm_agentserve.simulator.kv_blocks import KvBlocks
from vllm_agentserve.simulator.load_search import Cell, Machine, Programs, averaged, p95, warm_up
from vllm_agentserve.simulator.pressure import Agent, FixedLimit, Outcome, PressureEngine
from vllm_agentserve.simulator.retention_table import BLOCK, GAPS_S, MACHINES, POOL

PRESSURES = (1, 2, 4)
SEEDS = range(5)
ONE_OF = 4
"""So many programs, and one of them is critical."""
NOBODY, ORDER, SPACE = "nobody critical", "order", "order and space"
ARMS = (NOBODY, ORDER, SPACE)
WITHOUT, BESIDE = "alone", "beside load control"
FIGURES = ("critical_mean_s", "critical_p95_s", "others_mean_s", "makespan_s")


def cell(name: str, pressure: float, gap_s: float) -> Cell:
    machine = Machine(name, MACHINES[name], int(POOL / pressure), BLOCK, 32, 2048)
    return Cell("", "", machine, Programs(16, (6, 6), 1500, 200, 32, gap_s, critical=ONE_OF), ())


def run(case: Cell, arm: str, seed: int, controls: bool, most: float = MOST) -> dict[str, float]:
    """The figures of one arm.

    Args:
        controls: whether load control runs.
        most: largest share of the reserve.
    """
    machine = case.machine
    gate = machine.control() if controls else FixedLimit()
    blocks = KvBlocks(machine.pool // machine.block - 1, machine.block)
    space = None
    if arm == SPACE:
        returns = None if isinstance(gate, FixedLimit) else gate.returns
        blocks.retention = Retention(blocks.capacity, returns, only_critical=True)
        space = Space(blocks.capacity, most)
    engine = PressureEngine(
        blocks,
        machine.cost,
        gate,
        machine.slots,
        machine.step_tokens,
        resume_first=True,
        beside_kept=True,
        critical_first=arm != NOBODY,
        space=space,
    )
    warm_up(case, engine, seed)
    began = engine.now_s
    traffic = case.traffic(seed)
    return figures(traffic, engine.run(traffic), began)


def figures(agents: list[Agent], outcome: Outcome, began_s: float) -> dict[str, float]:
    """Sessions of the critical programs and of the others, in s."""
    critical = [outcome.sessions[agent.name] for agent in agents if agent.critical]
    others = [outcome.sessions[agent.name] for agent in agents if not agent.critical]
    return {
        "critical_mean_s": mean(critical),
        "critical_p95_s": p95(critical),
        "others_mean_s": mean(others),
        "makespan_s": outcome.ended_s - began_s,
        "hit_ratio": outcome.hit_ratio,
    }


HEAD = """# Space for critical programs, in the simulator

    python -m vllm_agentserve.simulator.space_table --output docs/results/space-simulated.json

The command writes the tables; the text around them is put in by hand, so give it another FILE to compare.

"""


def tables(rows: list[dict[str, Any]]) -> str:
    def fields(row: dict[str, Any]) -> list[str]:
        return [" / ".join(f"{row['arms'][arm][name]:.1f}" for name in FIGURES) for arm in ARMS]

    return arm_tables(ARMS, [(f"{row['machine']}, {row['beside']}", row["cell"], fields(row)) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the tables go beside it, as .md")
    given = parser.parse_args()
    rows = []
    for name in MACHINES:
        for beside in (WITHOUT, BESIDE):
            for pressure in PRESSURES:
                for gap_s in GAPS_S:
                    case = cell(name, pressure, gap_s)
                    arms = {arm: averaged([run(case, arm, seed, beside == BESIDE) for seed in SEEDS]) for arm in ARMS}
                    rows.append({"machine": name, "beside": beside, "cell": f"{pressure} x, {gap_s:g} s", "arms": arms})
                    print(name, beside, rows[-1]["cell"], flush=True)
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(HEAD + tables(rows))


if __name__ == "__main__":
    main()
