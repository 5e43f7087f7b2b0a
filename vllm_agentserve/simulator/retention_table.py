"""Retention in the simulator, without load control and with it: `python -m … --output FILE`.

Writes a JSON file with all figures, and a page with a table beside it. Everything is drawn from seeds: the same command gives the
same figures.
"""

import argparse
import json
from pathlib import Path

from vllm_agentserve.policy.retention import Retention
from vllm_agentserve.simulator.arm_tables import arm_tables, found_and_sessions
from vllm_agentserve.simulator.kv_blocks import KvBlocks
from vllm_agentserve.simulator.load_search import (
    ENGINE,
    MEASURED,
    SERVER,
    Cell,
    Machine,
    Programs,
    averaged,
    figures,
    warm_up,
)
from vllm_agentserve.simulator.pressure import FixedLimit, PressureEngine

POOL, BLOCK = 43_008, 16
"""Tokens that the contexts of all programs have at their ends."""
PRESSURES = (0.5, 1, 2, 4)
GAPS_S = (0.2, 1.0, 5.0)
SEEDS = range(3)
MACHINES = {"measured": MEASURED, "engine": ENGINE, "server": SERVER}
STOCK, CONTROL, RETENTION, BOTH = "stock", "load control", "retention", "both"
ORDER, NOBODY_WAITS = "order only", "both, nobody waits"
ARMS = {
    STOCK: (False, False, False, False),
    ORDER: (True, False, False, False),
    CONTROL: (True, True, False, False),
    RETENTION: (True, False, True, True),
    BOTH: (True, True, True, True),
    NOBODY_WAITS: (True, True, True, False),
}
"""By name: resume prefills first, load control, retention, whether calls wait for blocks that are not kept."""


def run(cell: Cell, arm: str, seed: int) -> dict[str, float]:
    first, controls, retains, waits = ARMS[arm]
    machine = cell.machine
    gate = machine.control() if controls else FixedLimit()
    blocks = KvBlocks(machine.pool // machine.block - 1, machine.block)
    if retains:
        blocks.retention = Retention(blocks.capacity, None if isinstance(gate, FixedLimit) else gate.returns)
    engine = PressureEngine(
        blocks,
        machine.cost,
        gate,
        machine.slots,
        machine.step_tokens,
        resume_first=first,
        beside_kept=waits,
    )
    warm_up(cell, engine, seed)
    began, broken = engine.now_s, blocks.broken
    found = figures(engine.run(cell.traffic(seed)), began)
    return found | {"broken_blocks": float(blocks.broken - broken)}


HEAD = """# Retention in the simulator

    python -m vllm_agentserve.simulator.retention_table --output docs/results/retention-simulated.json

The command writes the tables; the text around them is put in by hand, so give it another FILE to compare.

"""


def tables(rows: list[dict[str, dict[str, float]]], names: list[tuple[str, str]]) -> str:
    fields = [[found_and_sessions(row[arm]) for arm in ARMS] for row in rows]
    return arm_tables(ARMS, [(of, cell, each) for (of, cell), each in zip(names, fields, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the tables go beside it, as .md")
    given = parser.parse_args()
    rows, names = [], []
    for name, cost in MACHINES.items():
        for pressure in PRESSURES:
            for gap_s in GAPS_S:
                machine = Machine(name, cost, int(POOL / pressure), BLOCK, 32, 2048)
                cell = Cell("", "", machine, Programs(16, (6, 6), 1500, 200, 32, gap_s), ())
                rows.append({arm: averaged([run(cell, arm, seed) for seed in SEEDS]) for arm in ARMS})
                names.append((name, f"{pressure:g} x, {gap_s:g} s"))
                print(names[-1], flush=True)
    figures_of = [{"machine": of, "cell": cell, "arms": row} for (of, cell), row in zip(names, rows, strict=True)]
    given.output.write_text(json.dumps(figures_of, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(HEAD + tables(rows, names))


if __name__ == "__main__":
    main()
