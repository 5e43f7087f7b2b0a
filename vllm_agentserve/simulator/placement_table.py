"""Placement policies side by side on several simulated engines: `python -m … --output FILE`.

Writes a JSON file with the figures of every seed, and tables in Markdown beside it. Everything is drawn from seeds: the same
command gives the same figures.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from pathlib import Path
from statistics import mean, stdev

from scipy import stats

from vllm_agentserve.bench.cost import StepCost
from vllm_agentserve.bench.measure import quantiles
from vllm_agentserve.policy.placement import Placement
from vllm_agentserve.simulator.cluster import Cluster, Failure
from vllm_agentserve.simulator.cluster_engine import Power, Tier
from vllm_agentserve.simulator.conversations import draw_conversations
from vllm_agentserve.simulator.handover import Link
from vllm_agentserve.simulator.load_search import H100

SEEDS = range(100, 110)
"""Others than those on which the policy was chosen."""
PER_ENGINE = 40
"""Conversations."""
PER_SECOND = 0.7
"""That begin, per engine."""
LOOSE, TIGHT = 950_000, 160_000
"""Tokens of an engine's KV cache."""
SERVER = Tier(H100, LOOSE, Power(idle=100.0, decode=350.0, prefill=650.0))
"""A 7B model on one H100, by arithmetic. The watts are our assumption."""
SLOW = Tier(
    StepCost(**{name: 2 * value for name, value in vars(H100).items()}),
    LOOSE // 2,
    Power(idle=40.0, decode=130.0, prefill=250.0),
)
"""A card of half the speed and half the memory, for less power."""


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Args:
        policy: of the placement.
        hands_over: whether a quarter of the engines only computes prompts.
        every_turn: whether they compute the prompts of all turns, not only of first ones.
        per_turn: whether every turn is decided by itself, from a prediction.
    """

    policy: str
    hands_over: bool = False
    every_turn: bool = False
    per_turn: bool = False


STICKY, LEAST, CONSERVE, AUTELLIX = "sticky", "least-loaded", "conserve", "autellix"
ONCE, PER_TURN, AWARE = "conserve, handed over once", "per turn, predicted", "per turn, predicted, no prefiller"
EVERY = "conserve, handed over every turn"
ARMS = {name: Arm(name) for name in ("round-robin", LEAST, "hash", STICKY, AUTELLIX, CONSERVE)} | {
    ONCE: Arm(CONSERVE, hands_over=True),
    EVERY: Arm(CONSERVE, hands_over=True, every_turn=True),
    PER_TURN: Arm(CONSERVE, hands_over=True, per_turn=True),
    AWARE: Arm(CONSERVE, per_turn=True),
}
FEWER_ARMS = (LEAST, "hash", STICKY, AUTELLIX, CONSERVE)

Figures = dict[str, float]


def run(
    arm: Arm,
    tiers: Sequence[Tier],
    seed: int,
    failures: Sequence[Failure] = (),
    link: Link | None = None,
    per_engine: float = PER_ENGINE,
    load: float = 1.0,
) -> Figures:
    """One arm on the conversations of one seed, of which begin `load` times as many as usual."""
    engines = load * len(tiers)
    agents = draw_conversations(seed, round(per_engine * engines), PER_SECOND * engines)
    cluster = Cluster(
        tiers,
        Placement(arm.policy),
        prefillers=len(tiers) // 4 if arm.hands_over else 0,
        every_turn=arm.every_turn,
        per_turn=arm.per_turn,
        link=link,
        failures=failures,
    )
    served = cluster.run(agents)
    work = [engine.work for engine in cluster.engines]
    sought = sum(one.sought for one in work)
    return {
        "first_p95_s": quantiles([*served.first_s.values()])["p95"],
        "first_mean_s": mean(served.first_s.values()),
        "turn_p95_s": quantiles(served.turns_s)["p95"],
        "found": sum(one.found for one in work) / sought,
        "joules": cluster.joules() / sum(one.answer_tokens for one in work),
        "changes": served.changes / len(agents),
        "moves": served.moves / len(agents),
        "transfers": served.transfers / len(agents),
        "makespan_s": served.ends_s,
    }


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, by Student."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(values: Sequence[float]) -> Interval:
    middle = mean(values)
    half = float(stats.t.isf(0.025, len(values) - 1)) * stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(middle, middle - half, middle + half)


def ratio(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean ratio over seeds, seed by seed."""
    found = interval([log(value / other) for value, other in zip(values, others, strict=True)])
    return Interval(exp(found.mean), exp(found.low), exp(found.high))


Rows = Mapping[str, Sequence[Figures]]
"""By arm: the figures of each seed."""


def column(rows: Rows, arm: str, figure: str) -> list[float]:
    return [one[figure] for one in rows[arm]]


COLUMNS: dict[str, Callable[[Rows, str], str]] = {
    "p95 to the first effective token, s": lambda rows, arm: str(interval(column(rows, arm, "first_p95_s"))),
    f"of {STICKY}'s": lambda rows, arm: (
        f"x{ratio(column(rows, arm, 'first_p95_s'), column(rows, STICKY, 'first_p95_s'))}"
    ),
    "p95 of a turn's first token, s": lambda rows, arm: f"{mean(column(rows, arm, 'turn_p95_s')):.2f}",
    "context found": lambda rows, arm: f"{mean(column(rows, arm, 'found')):.2f}",
    "J per token": lambda rows, arm: str(interval(column(rows, arm, "joules"))),
    "changes of engine": lambda rows, arm: f"{mean(column(rows, arm, 'changes')):.2f}",
    "transfers": lambda rows, arm: f"{mean(column(rows, arm, 'transfers')):.2f}",
}


def table(rows: Rows) -> str:
    lines = ["| policy | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {arm} | " + " | ".join(make(rows, arm) for make in COLUMNS.values()) + " |" for arm in rows]
    return "\n".join(lines)


def claims(rows: Rows) -> str:
    """The ratios that papers name."""
    lines = []
    for arm, other in (
        (ONCE, PER_TURN),
        (ONCE, EVERY),
        (CONSERVE, PER_TURN),
        (CONSERVE, EVERY),
        (CONSERVE, AWARE),
        (AUTELLIX, LEAST),
        (CONSERVE, STICKY),
    ):
        if arm in rows and other in rows:
            first = ratio(column(rows, arm, "first_p95_s"), column(rows, other, "first_p95_s"))
            joules = ratio(column(rows, arm, "joules"), column(rows, other, "joules"))
            lines.append(f"| {arm} / {other} | x{first} | x{joules} |")
    return "\n".join(["| ratio | p95 to the first effective token | J per token |", "|---" * 3 + "|", *lines])


@dataclass(frozen=True)
class Setting:
    """Engines, and what happens to them."""

    name: str
    tiers: tuple[Tier, ...]
    arms: tuple[str, ...] = tuple(ARMS)
    failures: tuple[Failure, ...] = ()
    link: Link | None = None
    load: float = 1.0


def settings() -> list[Setting]:
    found = []
    for engines in (4, 16):
        for name, capacity in (("loose", LOOSE), ("tight", TIGHT)):
            tier = replace(SERVER, capacity=capacity)
            found.append(Setting(f"{engines} engines, {name} KV ({capacity // 1000}k tokens each)", (tier,) * engines))
    slow_link = Link(bytes_per_s=1.25e9)
    arms = (STICKY, CONSERVE, ONCE, EVERY, PER_TURN)
    found.append(Setting("4 engines, loose KV, 10 Gbit/s between engines", (SERVER,) * 4, arms, link=slow_link))
    half = replace(SERVER, capacity=TIGHT), replace(SLOW, capacity=TIGHT // 2)
    found.append(Setting("4 engines, two of them of half the speed and half the KV (tight)", (*half, *half), load=0.75))
    failure = Failure(1, 25.0, 40.0)
    tier = replace(SERVER, capacity=TIGHT)
    found.append(
        Setting("4 engines, tight KV, one of them dead from 25 s to 40 s", (tier,) * 4, FEWER_ARMS, (failure,))
    )
    return found


HEAD = """# Placement on several engines in the simulator

    python -m vllm_agentserve.simulator.placement_table --output docs/results/placement-simulated.json

The command writes the tables and the raw data beside them; the text is put in by hand, so give it another FILE to compare.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the tables go beside it, as .md")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--conversations", type=int, default=PER_ENGINE, help="per engine")
    given = parser.parse_args()
    results, text = [], []
    for setting in settings():
        rows = {
            arm: [
                run(ARMS[arm], setting.tiers, seed, setting.failures, setting.link, given.conversations, setting.load)
                for seed in SEEDS[: given.seeds]
            ]
            for arm in setting.arms
        }
        results.append({"setting": setting.name, "seeds": rows})
        text.append(f"### {setting.name}\n\n{table(rows)}\n\n{claims(rows)}\n")
        print(text[-1], flush=True)
    given.output.write_text(json.dumps(results, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(HEAD + "\n".join(text))


if __name__ == "__main__":
    main()
