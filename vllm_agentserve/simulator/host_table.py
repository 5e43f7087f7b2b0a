"""Host memory that is too small, with each policy and without it, in the simulator: `python -m … --output FILE`.

Writes a JSON file with all figures, and a page with tables beside it. Everything is drawn from seeds: the same command gives the
same figures.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_agentserve.simulator.arm_tables import arm_tables, found_and_sessions
from vllm_agentserve.simulator.host_blocks import NO_HOST, HostLink
from vllm_agentserve.simulator.host_policies import POLICIES, LruBlocks
from vllm_agentserve.simulator.kv_blocks import KvBlocks
from vllm_agentserve.simulator.load_search import (
    COPIES,
    ENGINE,
    MEASURED,
    Cell,
    Machine,
    Programs,
    averaged,
    figures,
    warm_up,
)
from vllm_agentserve.simulator.pressure import Ends, FixedLimit, PressureEngine

LIVE, BLOCK = 43_008, 16
"""Tokens that the contexts of all programs have at their ends; tokens per block."""
PRESSURES = (2, 4)
GAPS_S = (0.2, 1.0, 5.0)
SEEDS = range(3)
NONE = "no host"
ARMS = (NONE, *POLICIES)


def cell(pressure: float, gap_s: float, share: float = 0.5, heavy: bool = False, measured: bool = False) -> Cell:
    """Sixteen programs of six turns that begin together.

    Args:
        pressure: live context over the KV cache.
        share: of what is live, what host memory has room for.
    """
    host = HostLink(int(share * LIVE), *COPIES)
    machine = Machine("", MEASURED if measured else ENGINE, int(LIVE / pressure), BLOCK, 32, 2048, host)
    return Cell("", "", machine, Programs(16, (6, 6), 1500, 200, 32, gap_s, heavy=heavy), ())


def others(pressure: float, kind: str) -> Cell:
    """Traffic of another shape, with host memory of half of what the cell above has live."""
    programs = {
        "two turns, long results": Programs(32, (2, 2), 600, 1200, 32, 0.5),
        "60 within 50 s": Programs(60, (4, 8), 1500, 200, 32, 1.0, 50.0, heavy=True),
        "short prompts, 12 turns": Programs(24, (12, 12), 250, 250, 32, 0.5),
    }[kind]
    case = cell(pressure, 1.0)
    shots = Programs(96, (1, 1), 800, 0, 32, 0.0, 20.0, told=False) if kind.startswith("60") else None
    return Cell("", "", case.machine, programs, (), one_shots=shots)


def run(case: Cell, arm: str, seed: int, controls: bool = False, ends: Ends = "told") -> dict[str, float]:
    """One run: `arm` is a policy of host memory, or `NONE`."""
    machine = case.machine
    gate = machine.control() if controls else FixedLimit()
    host = NO_HOST if arm == NONE else machine.host
    if controls and arm == NONE:
        gate = Machine("", machine.cost, machine.pool, machine.block, machine.slots, machine.step_tokens).control()
    engine = PressureEngine(
        KvBlocks(machine.pool // machine.block - 1, machine.block),
        machine.cost,
        gate,
        machine.slots,
        machine.step_tokens,
        ends=ends,
        resume_first=True,
        host=host,
        host_policy=POLICIES.get(arm, LruBlocks),
    )
    warm_up(case, engine, seed)
    began = engine.now_s
    return figures(engine.run(case.traffic(seed)), began)


def cases() -> Iterator[tuple[str, str, Cell, bool, Ends]]:
    """Table, row, traffic, whether load control runs, and what clients say of ends."""
    for pressure in PRESSURES:
        for gap_s in GAPS_S:
            name = f"{pressure:g} x, {gap_s:g} s"
            yield "Host memory of half of what is live", name, cell(pressure, gap_s), False, "told"
    for pressure in PRESSURES:
        for gap_s in GAPS_S:
            name = f"{pressure:g} x, {gap_s:g} s"
            yield "The same beside load control", name, cell(pressure, gap_s), True, "told"
    for pressure in PRESSURES:
        for gap_s in GAPS_S:
            name = f"{pressure:g} x, {gap_s:g} s"
            yield "The same with costs measured behind HTTP", name, cell(pressure, gap_s, measured=True), True, "untold"
    for pressure in PRESSURES:
        for gap_s in GAPS_S:
            name = f"{pressure:g} x, {gap_s:g} s"
            yield "Host memory of a quarter", name, cell(pressure, gap_s, 0.25), False, "told"
    for pressure in PRESSURES:
        yield "Gaps with a heavy tail", f"{pressure:g} x, 1 s", cell(pressure, 1.0, heavy=True), False, "untold"
        yield "Every call is said to be the last", f"{pressure:g} x, 1 s", cell(pressure, 1.0), False, "untrue"
        for kind in ("two turns, long results", "60 within 50 s", "short prompts, 12 turns"):
            yield "Other traffic", f"{pressure:g} x, {kind}", others(pressure, kind), False, "untold"


def table(rows: list[dict[str, Any]]) -> str:
    named = [(row["table"], row["row"], [found_and_sessions(row["arms"][arm]) for arm in ARMS]) for row in rows]
    return arm_tables(ARMS, named, "##")


HEAD = """# Small host memory in the simulator

    python -m vllm_agentserve.simulator.host_table --output docs/results/host-simulated.json

The command writes the tables; the text around them is put in by hand, so give it another FILE to compare.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the tables go beside it, as .md")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, row, case, controls, ends in cases():
        arms = {arm: averaged([run(case, arm, seed, controls, ends) for seed in SEEDS]) for arm in ARMS}
        rows.append({"table": name, "row": row, "arms": arms})
        print(name, row, flush=True)
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(HEAD + table(rows))


if __name__ == "__main__":
    main()
