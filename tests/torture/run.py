"""The torture rig's command: random episodes in every mode and order, each compared with stock vLLM.

    python -m tests.torture.run --episodes 1                 # per configuration; four minutes
    python -m tests.torture.run --replay FILE                # a failing episode that an earlier run has written

An episode that fails is cut down and written to `--failures`; the command to run it again is printed, and the exit code is 1.
"""

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tests.support.environment  # noqa: F401
from tests.support.mix import make_llm
from tests.torture.adapters import ENGINE
from tests.torture.contents import Contents, Looked
from tests.torture.episode import BLOCK, Episode, draw
from tests.torture.reference import Reference
from tests.torture.rig import Outcome, Rig, compare
from tests.torture.shrink import shrink
from vllm_agentserve.toy import make_toy_model

BLOCKS = 129
"""KV blocks: far too few for an episode, so that sequences are preempted."""
ROOMY_BLOCKS = 1600
"""Those of the stock engine whose answers are the reference."""
COMMON = {
    "tpot_slo_ms": 30,
    "lane_min_tokens": 48,
    "lane_chunk_tokens": 64,
    "lane_restarts": 1000,
    "first_chunk_tokens": 16,
}
POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "plas": {"program_quantum_ms": 1, "program_preempt_share": 0.5, "program_promote_ratio": 1000},
    "atlas": {"program_quantum_ms": 5, "program_ttl_s": 1},
}
ADAPTERS = 2
MODES = ("lanes", "time-sliced", "auto", "stock")


def options_of(mode: str, policy: str) -> dict[str, Any]:
    """Options of the scheduler with which much happens in little time."""
    return COMMON | POLICIES[policy] | {"mode": mode, "policy": policy}


def configurations() -> list[tuple[dict[str, Any], int]]:
    """Options and adapters: every mode with every order, the most different ones first, then LoRA."""
    pairs = sorted(itertools.product(range(len(MODES)), range(len(POLICIES))), key=lambda p: ((p[0] + p[1]) % 3, p))
    policies = list(POLICIES)
    chosen = [(options_of(MODES[m], policies[p]), 0) for m, p in pairs]
    return chosen + [(options_of("auto", policy), ADAPTERS) for policy in ("fcfs", "plas")]


def rig_of(options: dict[str, Any] | None, adapters: int, blocks: int = BLOCKS) -> Rig:
    """A new engine, with our scheduler and these options or stock vLLM with None; without adapters the contents of its KV
    blocks are compared."""
    model = make_toy_model()
    llm = make_llm(model, options, blocks, block_size=BLOCK, **(ENGINE if adapters else {}))
    return Rig(llm, None if adapters else Contents(llm, Reference(model)))


@dataclass
class Tally:
    """What a run of the rig counts."""

    episodes: int = 0
    requests: int = 0
    together: int = 0
    """Requests that came in the same step as another."""
    aborts: int = 0
    preemptions: int = 0
    faults: int = 0
    mismatches: int = 0
    ties: int = 0
    blocks: dict[str, float] = field(default_factory=dict)
    """What `Looked` counts, of all engines."""
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, outcome: Outcome, wrong: list[str], ties: list[str]) -> None:
        """An episode is over; what it got wrong is printed."""
        self.episodes += 1
        self.requests += outcome.requests
        self.together += outcome.together
        self.aborts += outcome.aborts
        self.preemptions += outcome.preemptions
        self.faults += outcome.faults
        self.mismatches += len(wrong)
        self.ties += len(ties)
        self.failures += [f"{name}: {line}" for line in wrong[:10]]
        print(f"{name}: {outcome.requests} requests, {len(wrong)} wrong, {len(ties)} ties", flush=True)
        for line in wrong[:10]:
            print(f"  {line}", flush=True)

    def engine_ends(self, looked: Looked) -> None:
        for name, number in asdict(looked).items():
            before = self.blocks.get(name, 0)
            self.blocks[name] = max(before, number) if isinstance(number, float) else before + number


def references(episodes: list[Episode]) -> dict[int, Outcome]:
    """What stock vLLM answers, with room for all; by seed. Raises `RuntimeError` when stock vLLM itself is wrong."""
    answers = {}
    for adapters in sorted({episode.adapters for episode in episodes}):
        rig = rig_of(None, adapters, ROOMY_BLOCKS)
        answers |= {one.seed: rig.run(one.undisturbed()) for one in episodes if one.adapters == adapters}
        rig.close()
    if wrong := [line for outcome in answers.values() for line in outcome.wrong]:
        raise RuntimeError(f"stock vLLM is not right, or the reference is not: {wrong[:10]}")
    return answers


def torture(episodes: list[Episode], stock: dict[int, Outcome], tally: Tally) -> list[Episode]:
    """Runs episodes of one configuration on one engine; returns those that failed, cut down."""
    options, adapters = episodes[0].options, episodes[0].adapters
    rig = rig_of(options, adapters)
    failed = []
    for episode in episodes:
        name = f"{options['mode']} {options['policy']}{' LoRA' if adapters else ''} seed {episode.seed}"
        try:
            ours = rig.run(episode)
        except Exception as error:
            # The engine is not to be trusted any more; the episode is kept as it is.
            tally.add(name, Outcome(), [repr(error)], [])
            failed.append(episode)
            tally.engine_ends(rig.close())
            rig = rig_of(options, adapters)
            continue
        wrong, ties = compare(episode, stock[episode.seed], ours)
        tally.add(name, ours, wrong, ties)
        if wrong:
            # Stock's answers to the rest do not depend on what is left out.
            whole = stock[episode.seed]
            failed.append(shrink(episode, lambda one, whole=whole, rig=rig: bool(compare(one, whole, rig.run(one))[0])))
    tally.engine_ends(rig.close())
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=4, help="per configuration (default: 4)")
    parser.add_argument(
        "--configurations", type=int, default=0, help="only the first so many, or the last with a minus (default: all)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--failures", type=Path, default=Path("bench-results/torture"))
    parser.add_argument("--replay", type=Path, help="an episode to run again")
    arguments = parser.parse_args()
    tally, began = Tally(), time.monotonic()
    if arguments.replay:
        episode = Episode.read(arguments.replay.read_text())
        return bool(torture([episode], references([episode]), tally))
    limit, every = arguments.configurations, configurations()
    chosen = every[limit:] if limit < 0 else every[: limit or None]
    seeds = itertools.count(arguments.seed)
    failed: list[Episode] = []
    batches = [
        [draw(next(seeds), options, adapters=adapters) for _ in range(arguments.episodes)]
        for options, adapters in chosen
    ]
    stock = references([episode for batch in batches for episode in batch])
    for batch in batches:
        failed += torture(batch, stock, tally)
    figures = {
        "command": " ".join(["python", "-m", "tests.torture.run", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "configurations": len(chosen),
        **vars(tally),
    }
    print(json.dumps(figures, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures) + "\n")
    for episode in failed:
        arguments.failures.mkdir(parents=True, exist_ok=True)
        path = arguments.failures / f"seed-{episode.seed}.json"
        path.write_text(episode.write())
        print(f"again: python -m tests.torture.run --replay {path}   ({len(episode.requests)} requests)")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
