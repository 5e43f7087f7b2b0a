"""Load control against no limit, every fixed limit and an endless KV cache, in the simulator: `python -m … --output FILE`.

Writes a JSON file with all figures, and a table in Markdown beside it. Everything is drawn from seeds: the same command gives
the same figures.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.policy.load import MAX_HOLD_S, LoadControl
from vllm_agentserve.simulator.host_blocks import NO_HOST, HostLink
from vllm_agentserve.simulator.kv_blocks import KvBlocks
from vllm_agentserve.simulator.pressure import Agent, Ends, FixedLimit, Gate, Outcome, PressureEngine, Turn

ENGINE = StepCost(base=4.63, sequence=0.12, context=0.48, tokens=51.5, attended=27.7, prefill=1.47)
"""The toy model on two cores, the engine alone (`docs/results/cost.json`)."""
SERVER = StepCost(base=6.5, sequence=0.3, context=0.6, tokens=75.0, attended=31.0, prefill=2.0)
"""About the same behind `vllm serve`, with a client on the same cores."""
MEASURED = StepCost(base=8.8, sequence=0.3, context=0.35, tokens=35.0, attended=16.5, prefill=2.0)
"""The same, chosen so that stock vLLM's sessions in the nine cells of `docs/results/pressure.md` come out within 15 %."""
H100 = StepCost(base=7.0, sequence=0.05, context=0.019, tokens=33.0, attended=0.9, prefill=1.0)
"""A 7B model on one H100, by arithmetic: 24k tokens per second at 20k of context."""
H100_POOL = 950_000
COPIES = 5.0, 0.0018
"""What a restore takes in ms, and each of its tokens: the toy model's copies as measured, and a step until they are noticed."""
COPIES_H100 = 7.0, 0.0011
"""56 KiB a token at 50 GB/s, by arithmetic."""


@dataclass(frozen=True)
class Machine:
    """An engine.

    Args:
        pool: tokens of its KV cache.
        block: tokens of a block; on GPUs larger than vLLM's, to be faster.
        host: memory behind the KV cache.
    """

    name: str
    cost: StepCost
    pool: int
    block: int
    slots: int
    step_tokens: int
    host: HostLink = NO_HOST

    def engine(self, load: Gate, ends: Ends = "told", endless: bool = False) -> PressureEngine:
        blocks = self.pool // self.block * (100 if endless else 1)
        pool = KvBlocks(blocks - 1, self.block)
        return PressureEngine(pool, self.cost, load, self.slots, self.step_tokens, ends=ends, host=self.host)

    def control(self, max_hold_s: float | None = None) -> LoadControl:
        tokens = (self.pool // self.block - 1) * self.block
        return LoadControl(tokens, self.block, MAX_HOLD_S if max_hold_s is None else max_hold_s, self.host)


@dataclass(frozen=True)
class Programs:
    """Agents of one kind.

    Args:
        turns: calls of each, least and most.
        first, added: tokens of the first prompt, and of each later one; drawn within a fifth.
        gap_s: between calls, drawn within a half, or log-normal if `heavy`.
        arrive_s: they come at random within so many seconds.
        burst: so many come at once, then as many again after `arrive_s`; 0 for no bursts.
        critical: one of so many is critical; 0 for none.
    """

    number: int
    turns: tuple[int, int]
    first: int
    added: int
    answer: int
    gap_s: float
    arrive_s: float = 0.0
    heavy: bool = False
    burst: int = 0
    told: bool = True
    critical: int = 0

    def draw(self, seed: int, kind: str = "agent") -> list[Agent]:
        rng = random.Random(f"{kind} {seed}")
        agents = []
        for index in range(self.number):
            turns = []
            for turn in range(rng.randint(*self.turns)):
                tokens = round((self.added if turn else self.first) * rng.uniform(0.8, 1.2))
                gap = rng.lognormvariate(-0.32, 0.8) if self.heavy else rng.uniform(0.5, 1.5)
                turns.append(Turn(tokens, self.answer, self.gap_s * gap if turn else 0.0))
            when = index // self.burst * self.arrive_s if self.burst else rng.uniform(0.0, self.arrive_s)
            critical = bool(self.critical) and index % self.critical == self.critical - 1
            agents.append(Agent(f"{kind}-{seed}-{index}", when, tuple(turns), told=self.told, critical=critical))
        return agents


@dataclass(frozen=True)
class Cell:
    """One case of the search: an engine, its traffic, and the fixed limits that are tried."""

    group: str
    name: str
    machine: Machine
    programs: Programs
    limits: tuple[int, ...]
    one_shots: Programs | None = None
    seeds: int = 2
    max_hold_s: float | None = None
    warm: str = "same"

    def traffic(self, seed: int) -> list[Agent]:
        return self.programs.draw(seed) + (self.one_shots.draw(seed, "one-shot") if self.one_shots else [])


def pressure_cells() -> list[Cell]:
    """The cells of the benchmark, and some beyond them."""
    cells = []
    gaps = {1: (0.2, 1.0, 5.0), 2: (0.1, 0.2, 1.0, 5.0, 30.0), 4: (0.2, 1.0, 5.0), 8: (0.2, 1.0, 5.0)}
    for machine, cost in (("measured", MEASURED), ("server", SERVER), ("engine", ENGINE)):
        for ratio in (1, 2, 4, 8):
            at = Machine(machine, cost, 43_008 // ratio, 128, 32, 2048)
            for gap in gaps[ratio]:
                if machine == "measured" or (ratio in (2, 4) and gap in (0.2, 1.0)):
                    programs = Programs(16, (6, 6), 1500, 200, 32, gap)
                    cells.append(
                        Cell("pressure", f"{machine} {ratio}x gap {gap:g} s", at, programs, (2, 4, 5, 6, 8, 10, 12))
                    )
    return cells


def other_cells() -> list[Cell]:
    cpu = Machine("engine", ENGINE, 21_504, 128, 32, 2048)
    small = Machine("engine", ENGINE, 10_752, 128, 32, 2048)
    h100 = Machine("H100", H100, H100_POOL, 512, 256, 8192)
    long = Machine("H100", H100, H100_POOL, 2048, 256, 8192)
    limits = (25, 30, 36, 43, 51)
    cells = [
        Cell(
            "few",
            "4 programs, 2x, gap 1 s",
            Machine("engine", ENGINE, 6_144, 128, 32, 2048),
            Programs(4, (6, 6), 1500, 200, 32, 1.0),
            (1, 2, 3),
        ),
        Cell(
            "few",
            "4 programs, 2x, gap 0.2 s",
            Machine("engine", ENGINE, 6_144, 128, 32, 2048),
            Programs(4, (6, 6), 1500, 200, 32, 0.2),
            (1, 2, 3),
        ),
        Cell(
            "bursts",
            "8 at once every 5 s, 48 in all, gap 0.5 s",
            small,
            Programs(48, (4, 8), 1500, 200, 32, 0.5, 5.0, burst=8),
            tuple(range(3, 12, 2)),
        ),
        Cell(
            "bursts",
            "16 at once every 15 s, 64 in all, gap 1 s",
            cpu,
            Programs(64, (4, 8), 1500, 200, 32, 1.0, 15.0, burst=16),
            tuple(range(5, 15, 2)),
        ),
        Cell(
            "growing",
            "short prompts, results as long, 12 turns, gap 0.5 s",
            cpu,
            Programs(24, (12, 12), 250, 250, 32, 0.5),
            tuple(range(4, 16, 2)),
        ),
        Cell(
            "growing",
            "3 to 20 turns, gap 0.5 s",
            cpu,
            Programs(32, (3, 20), 1000, 150, 32, 0.5),
            tuple(range(4, 16, 2)),
        ),
        Cell(
            "growing",
            "two turns, long results, gap 0.5 s",
            cpu,
            Programs(32, (2, 2), 600, 1200, 32, 0.5),
            tuple(range(6, 30, 3)),
        ),
        Cell(
            "at random",
            "60 within 100 s, below capacity, gap 1 s",
            cpu,
            Programs(60, (4, 8), 1500, 200, 32, 1.0, 100.0),
            tuple(range(5, 16, 2)),
        ),
        Cell(
            "at random",
            "60 within 50 s, heavy gaps of 1 s",
            cpu,
            Programs(60, (4, 8), 1500, 200, 32, 1.0, 50.0, heavy=True),
            tuple(range(5, 16, 2)),
        ),
    ]
    for told, name in ((True, "named"), (False, "unnamed")):
        cells.append(
            Cell(
                "one-shot",
                f"16 agents, {name}, and 96 one-shot prompts, 2x, gap 1 s",
                cpu,
                Programs(16, (6, 6), 1500, 200, 32, 1.0, told=told),
                tuple(range(5, 16, 2)),
                one_shots=Programs(96, (1, 1), 800, 0, 32, 0.0, 20.0, told=False),
            )
        )
    cells.append(
        Cell(
            "one-shot", "300 one-shot prompts alone", cpu, Programs(300, (1, 1), 1500, 0, 32, 0.0, 20.0, told=False), ()
        )
    )
    for number in (40, 80, 300):
        for gap in (0.5, 15.0, 30.0)[: 2 if number == 300 else 3]:
            cells.append(
                Cell(
                    "H100, 16k to 24k",
                    f"{number} programs, gap {gap:g} s",
                    h100,
                    Programs(number, (8, 8), 16_000, 1000, 100, gap, heavy=True),
                    limits,
                    seeds=1,
                )
            )
    for number in (7, 28):
        for gap in (2.0, 30.0):
            cells.append(
                Cell(
                    "H100, 100k to 140k",
                    f"{number} programs, gap {gap:g} s",
                    long,
                    Programs(number, (8, 8), 100_000, 5000, 100, gap, heavy=True),
                    (4, 5, 6, 7),
                    seeds=1,
                )
            )
    cells.append(
        Cell(
            "H100, 16k to 24k",
            "300 programs, gap 15 s, held up to an hour",
            h100,
            Programs(300, (8, 8), 16_000, 1000, 100, 15.0, heavy=True),
            limits,
            seeds=1,
            max_hold_s=3600.0,
        )
    )
    cells.append(
        Cell(
            "H100, 16k to 24k",
            "500 programs within 600 s, gap 3 s",
            h100,
            Programs(500, (4, 12), 16_000, 1000, 100, 3.0, 600.0, heavy=True),
            limits,
            seeds=1,
        )
    )
    return cells


def host_cells() -> list[Cell]:
    """Host memory of half the KV cache, as much, twice and four times as much."""
    cells = []
    for ratio in (2, 4):
        pool = 43_008 // ratio
        for gap in (0.2, 1.0, 5.0):
            for size in (0.5, 1.0, 2.0, 4.0):
                at = Machine("engine", ENGINE, pool, 128, 32, 2048, HostLink(int(size * pool), *COPIES))
                programs = Programs(16, (6, 6), 1500, 200, 32, gap)
                name = f"{ratio}x gap {gap:g} s, host {size:g} x the pool"
                cells.append(Cell("host", name, at, programs, (4, 5, 6, 8, 10, 12)))
    for gap in (0.5, 15.0):
        for size in (1.0, 2.0, 4.0):
            at = Machine("H100", H100, H100_POOL, 512, 256, 8192, HostLink(int(size * H100_POOL), *COPIES_H100))
            programs = Programs(80, (8, 8), 16_000, 1000, 100, gap, heavy=True)
            name = f"H100, 80 programs, gap {gap:g} s, host {size:g} x the pool"
            cells.append(Cell("host", name, at, programs, (30, 43, 60, 80, 120), seeds=1))
    return cells


def p95(values: Sequence[float]) -> float:
    """Of so few values that it is one of the longest."""
    ordered = sorted(values)
    return ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]


def figures(outcome: Outcome, began_s: float) -> dict[str, float]:
    """Of the programs, and of the one-shot calls beside them."""
    programs = [seconds for name, seconds in outcome.sessions.items() if name.startswith("agent")]
    others = [seconds for name, seconds in outcome.sessions.items() if not name.startswith("agent")]
    makespan = outcome.ended_s - began_s
    found = {
        "session_mean_s": mean(programs),
        "session_p95_s": p95(programs),
        "makespan_s": makespan,
        "turns_per_s": outcome.turns / makespan,
        "hit_ratio": outcome.hit_ratio,
        "held_mean_s": mean(outcome.held_s),
        "held_max_s": max(outcome.held_s),
    }
    if outcome.restored:
        found["restored_ratio"] = outcome.restored / outcome.sought
    return found | ({"one_shot_mean_s": mean(others)} if others else {})


def averaged(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: mean(row.get(name, 0.0) for row in rows) for row in rows for name in row}


def warm_up(cell: Cell, engine: PressureEngine, seed: int) -> None:
    """A few programs before, which the engine learns from.

    `same`: of the same kind, as a server in use has seen them. `two-turns`: two turns each, tools of 50 ms. `benchmark`: two
    turns each, answers half as long, one program every 0.2 s, and the traffic follows at once, as after the warm-up of
    `agentserve bench`.
    """
    if cell.warm == "none":
        return
    programs, same = cell.programs, cell.warm == "same"
    few = Programs(
        min(programs.number, 16),
        programs.turns if same else (min(2, programs.turns[0]), min(2, programs.turns[1])),
        programs.first,
        programs.added,
        programs.answer,
        0.05 if cell.warm == "two-turns" else programs.gap_s,
        5.0 if same else 0.2,
        programs.heavy and same,
        burst=0 if same else 1,
        told=programs.told,
    )
    agents = few.draw(seed + 1000, "warm-up")
    if cell.one_shots:
        agents += cell.one_shots.draw(seed + 1000, "warm-up one-shot")
    engine.run(agents)
    engine.now_s += 0.1 if cell.warm == "benchmark" else 10.0


def controlled(cell: Cell, seed: int, ends: Ends = "told") -> dict[str, float]:
    engine = cell.machine.engine(cell.machine.control(cell.max_hold_s), ends)
    warm_up(cell, engine, seed)
    began = engine.now_s
    return figures(engine.run(cell.traffic(seed)), began)


def measure(cell: Cell) -> dict[str, Any]:
    """All arms of a cell."""
    seeds = range(cell.seeds)

    def arm(run: Callable[[int], dict[str, float]]) -> dict[str, float]:
        return averaged([run(seed) for seed in seeds])

    def limited(limit: int) -> Callable[[int], dict[str, float]]:
        def run(seed: int) -> dict[str, float]:
            agents = cell.traffic(seed)
            gate = FixedLimit(limit, {agent.name: len(agent.turns) for agent in agents})
            return figures(cell.machine.engine(gate).run(agents), 0.0)

        return run

    fixed = {limit: arm(limited(limit)) for limit in cell.limits if limit < cell.programs.number}
    best = min(fixed, key=lambda limit: fixed[limit]["session_mean_s"]) if fixed else None
    return {
        "group": cell.group,
        "cell": cell.name,
        "none": arm(lambda seed: figures(cell.machine.engine(FixedLimit()).run(cell.traffic(seed)), 0.0)),
        "control": arm(lambda seed: controlled(cell, seed)),
        "control, ends not told": arm(lambda seed: controlled(cell, seed, "untold")),
        "control, every call told to be the last": arm(lambda seed: controlled(cell, seed, "untrue")),
        "best limit": best,
        "fixed": fixed[best] if best is not None else None,
        "endless": arm(
            lambda seed: figures(cell.machine.engine(FixedLimit(), endless=True).run(cell.traffic(seed)), 0.0)
        ),
    }


HEAD = """# Load control in the simulator

    python -m vllm_agentserve.simulator.load_search --output docs/results/load-simulated.json
    python -m vllm_agentserve.simulator.load_search --output FILE --groups pressure --warm two-turns    # or benchmark, none

The first command writes a page with its tables only; those of the second are put in by hand, so give it another FILE to compare.

Figures are relative to the same traffic without load control: session mean / p95 / makespan, then the share of resumed
context that was found.
A session is counted from its arrival, so holding is part of it.
*Control* has seen up to 16 programs of the same kind before, as a server in use has.
*Ends not told*: the client never says which call is the last. *Ends told wrongly*: it says so of every call.
*Best fixed limit*: of so many programs at once, the one with the shortest mean, found by trying; it knows when programs end.
*Endless*: a KV cache without bounds.
`measured` is the toy model behind HTTP on two cores, with costs at which stock vLLM's sessions in the nine cells of
[pressure.md](pressure.md) come out within 15 %; `server` is a slower such machine, `engine` the engine alone; `H100` is a 7B
model by arithmetic, never run.
Which traffic a cell has is in `simulator/load_search.py`.
Cells with host memory have the traffic of pressure cells. What the cache has dropped comes back from there: no step takes longer
for it, and its call waits. Hits are what was found in either.

What to know when reading:

- A fresh server has seen nobody come back, so it lets everybody begin; the first returns change that for those who still wait.
- Where a limit is thought to give less than 0.9 times the turns per second of none there is none, though sessions would be
  shorter in the mean: their p95 would be longer.
- Nobody is held for more than 480 s unless a cell says so. A queue that is longer than that begins all at once.
- Programs that end after two turns with long results are held for too long until 24 of them were seen.

"""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Session mean, p95 and makespan relative to no limit; turns per second."""
    lines = []
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines += ["", f"### {group}", ""]
            lines.append(
                "| cell | no limit: mean (s), hits | control: mean / p95 / makespan, hits | ends not told | ends told wrongly "
                "| best fixed limit "
                "| turns/s: none, control, fixed, endless | held at most (s) |"
            )
            lines.append("|---|---|---|---|---|---|---|---|")
        none: dict[str, float] = row["none"]

        def ratios(name: str, of: dict[str, float] = none, row: dict[str, Any] = row) -> str:
            arm: dict[str, float] | None = row[name]
            if arm is None:
                return ""
            text = " / ".join(f"{arm[key] / of[key]:.2f}" for key in ("session_mean_s", "session_p95_s", "makespan_s"))
            if "one_shot_mean_s" in arm:
                text += f"; one-shot {arm['one_shot_mean_s'] / of['one_shot_mean_s']:.2f}"
            return f"{text}, {arm['hit_ratio']:.2f}"

        rates = ", ".join(
            f"{row[name]['turns_per_s']:.2f}" if row[name] else "-" for name in ("none", "control", "fixed", "endless")
        )
        limit = f"{row['best limit']}: {ratios('fixed')}" if row["fixed"] else "-"
        lines.append(
            f"| {row['cell']} | {none['session_mean_s']:.1f}, {none['hit_ratio']:.2f} | {ratios('control')} "
            f"| {ratios('control, ends not told')} | {ratios('control, every call told to be the last')} | {limit} | {rates} "
            f"| {row['control']['held_max_s']:.0f} |"
        )
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the table goes beside it, as .md")
    parser.add_argument("--groups", nargs="*", help="only these")
    parser.add_argument("--warm", choices=("same", "two-turns", "benchmark", "none"), default="same")
    given = parser.parse_args()
    cells = [
        cell
        for cell in pressure_cells() + other_cells() + host_cells()
        if not given.groups or cell.group in given.groups
    ]
    # Each group is one table.
    groups = [cell.group for cell in cells]
    cells.sort(key=lambda cell: groups.index(cell.group))
    rows = []
    for cell in cells:
        rows.append(measure(Cell(**{**cell.__dict__, "warm": given.warm})))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        given.output.write_text(json.dumps(rows, indent=1) + "\n")
        given.output.with_suffix(".md").write_text(HEAD + table(rows))


if __name__ == "__main__":
    main()
