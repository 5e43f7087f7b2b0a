"""The torture rig's command: random episodes in every mode and order, each compared with stock vLLM.

    python tests/torture/run.py --episodes 1                 # per configuration; four minutes
    python tests/torture/run.py --minutes 60                 # rounds with new seeds until then: a soak
    python tests/torture/run.py --replay FILE                # a failing episode that an earlier run has written

An episode that fails is cut down and written to `--failures`; the command to run it again is printed, and the exit code is 1.
"""

import argparse
import gc
import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conftest  # noqa: F401  the environment of the tests
import psutil
from mix import close, make_llm

from torture.episode import Episode, draw
from torture.rig import Outcome, Rig, compare
from torture.shrink import shrink
from vllm_agentserve.toy import make_toy_model

ROOMY_BLOCKS = 400
"""KV blocks of the stock engine whose answers are the reference."""
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
MODES = ("lanes", "time-sliced", "auto", "stock")


def configurations() -> list[dict[str, Any]]:
    """Every mode with every order, the most different ones first."""
    pairs = sorted(itertools.product(range(len(MODES)), range(len(POLICIES))), key=lambda p: ((p[0] + p[1]) % 3, p))
    policies = list(POLICIES)
    return [COMMON | POLICIES[policies[p]] | {"mode": MODES[m], "policy": policies[p]} for m, p in pairs]


@dataclass
class Tally:
    """What a run of the rig counts."""

    episodes: int = 0
    requests: int = 0
    aborts: int = 0
    preemptions: int = 0
    faults: int = 0
    mismatches: int = 0
    ties: int = 0
    rss_mib: list[tuple[float, float]] = field(default_factory=list)
    """(hours since the start, resident memory of the engine's process and its lane), after every episode."""
    failures: list[str] = field(default_factory=list)


def resident_mib() -> float:
    me = psutil.Process()
    return sum(one.memory_info().rss for one in (me, *me.children(recursive=True))) / 2**20


def references(episodes: list[Episode]) -> dict[int, Outcome]:
    """What stock vLLM answers, with room for all; by seed."""
    llm = make_llm(make_toy_model(), None, ROOMY_BLOCKS)
    rig = Rig(llm)
    answers = {episode.seed: rig.run(episode.undisturbed()) for episode in episodes}
    close(llm)
    return answers


def torture(
    options: dict[str, Any], episodes: list[Episode], stock: dict[int, Outcome], tally: Tally, began: float
) -> list[Episode]:
    """Runs episodes on one engine; returns those that failed, cut down."""
    llm = make_llm(make_toy_model(), options)
    rig = Rig(llm)
    failed = []
    for episode in episodes:
        tally.episodes += 1
        name = f"{options['mode']} {options['policy']} seed {episode.seed}"
        try:
            ours = rig.run(episode)
        except Exception as error:
            # The engine is not to be trusted any more; the episode is kept as it is.
            print(f"{name}: {error!r}", flush=True)
            tally.failures.append(f"{name}: {error!r}")
            tally.mismatches += 1
            failed.append(episode)
            close(llm)
            llm = make_llm(make_toy_model(), options)
            rig = Rig(llm)
            continue
        wrong, ties = compare(episode, stock[episode.seed], ours)
        tally.requests += ours.requests
        tally.aborts += ours.aborts
        tally.preemptions += ours.preemptions
        tally.faults += ours.faults
        tally.mismatches += len(wrong)
        tally.ties += len(ties)
        tally.rss_mib.append((round((time.monotonic() - began) / 3600, 4), round(resident_mib(), 1)))
        print(f"{name}: {ours.requests} requests, {len(wrong)} wrong, {len(ties)} ties", flush=True)
        if wrong:
            print("\n".join(f"  {line}" for line in wrong[:10]), flush=True)
            tally.failures += [f"{name}: {line}" for line in wrong[:10]]
            # Stock's answers to the rest do not depend on what is left out.
            whole = stock[episode.seed]
            failed.append(shrink(episode, lambda one, whole=whole, rig=rig: bool(compare(one, whole, rig.run(one))[0])))
    close(llm)
    gc.collect()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=4, help="per configuration and round (default: 4)")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="rounds until so much time has passed (default: one round)"
    )
    parser.add_argument("--configurations", type=int, default=0, help="only the first so many (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--failures", type=Path, default=Path("bench-results/torture"))
    parser.add_argument("--replay", type=Path, help="an episode to run again")
    arguments = parser.parse_args()
    tally, began = Tally(), time.monotonic()
    if arguments.replay:
        episode = Episode.read(arguments.replay.read_text())
        return bool(torture(episode.options, [episode], references([episode]), tally, began))
    chosen = configurations()[: arguments.configurations or None]
    seeds = itertools.count(arguments.seed)
    failed: list[Episode] = []
    while True:
        batches = [[draw(next(seeds), options) for _ in range(arguments.episodes)] for options in chosen]
        stock = references([episode for batch in batches for episode in batch])
        for options, batch in zip(chosen, batches, strict=True):
            failed += torture(options, batch, stock, tally, began)
        if time.monotonic() - began >= arguments.minutes * 60:
            break
    figures = {
        "command": " ".join(["python", "tests/torture/run.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "hours": round((time.monotonic() - began) / 3600, 3),
        "configurations": len(chosen),
        **vars(tally),
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "rss_mib"}, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures) + "\n")
    for episode in failed:
        arguments.failures.mkdir(parents=True, exist_ok=True)
        path = arguments.failures / f"seed-{episode.seed}.json"
        path.write_text(episode.write())
        print(f"again: python tests/torture/run.py --replay {path}   ({len(episode.requests)} requests)")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
