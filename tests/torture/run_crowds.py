"""The command of the crowds: many short requests with shared prefixes that come in the same steps, on one engine with a prefill
lane. What every lane job reads and writes, the prefix cache and every answer are compared with the reference, and before that
the prefix cache and the answers of stock vLLM.

    python -m tests.torture.run_crowds --requests 20000 --output docs/results/torture-contents.json

The exit code is 1 if anything is wrong; a wrong episode is cut down to a few requests and written to `--failures`.
"""

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Threads that wait do not take the cores from those that compute.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import tests.support.environment  # noqa: F401
from tests.support.mix import make_llm
from tests.torture.contents import LOGIT_TOLERANCE, TOLERANCE, Contents, Looked
from tests.torture.crowd import OPTIONS, SMALL, draw_crowd, small_model
from tests.torture.episode import BLOCK, Episode
from tests.torture.reference import Reference
from tests.torture.rig import Outcome, Rig
from tests.torture.run import BLOCKS, Tally
from tests.torture.shrink import shrink
from vllm_agentserve.bench.machine import describe_machine

SHRINK_TRIES = 40


def crowd_rig(options: dict[str, Any] | None) -> Rig:
    """An engine for the small model with these options of our scheduler, or stock vLLM with None."""
    model = small_model()
    llm = make_llm(model, options, BLOCKS, block_size=BLOCK)
    return Rig(llm, Contents(llm, Reference(model)))


def stock_is_right(episode: Episode) -> Looked:
    """Raises `RuntimeError` when stock vLLM and the reference are not of one opinion."""
    rig = crowd_rig(None)
    wrong = rig.run(episode.undisturbed()).wrong
    if wrong:
        raise RuntimeError(f"stock vLLM is not right, or the reference is not: {wrong[:10]}")
    return rig.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000, help="at least so many (default: 20000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--failures", type=Path, default=Path("bench-results/torture"))
    parser.add_argument("--replay", type=Path, help="an episode to run again")
    arguments = parser.parse_args()
    tally, began, failed = Tally(), time.monotonic(), None
    episodes = (draw_crowd(seed) for seed in itertools.count(arguments.seed))
    if arguments.replay:
        episodes, arguments.requests = iter([Episode.read(arguments.replay.read_text())]), 1
    first = next(episodes)
    stock = stock_is_right(first)
    rig = crowd_rig(first.options)
    assert rig.contents is not None
    for episode in itertools.chain([first], episodes):
        try:
            outcome = rig.run(episode)
        except Exception as error:  # the engine is not to be trusted any more
            tally.add(f"seed {episode.seed}", Outcome(), [repr(error)], [])
            break
        tally.add(f"seed {episode.seed}, {time.monotonic() - began:.0f} s", outcome, outcome.wrong, [])
        if outcome.wrong and failed is None and not arguments.replay:
            failed = episode
        if tally.requests >= arguments.requests:
            break
    steps, seconds = dict(rig.scheduler.counts), time.monotonic() - began
    tally.engine_ends(rig.contents.looked)
    if failed is not None:
        small = shrink(failed, lambda each: bool(rig.run(each).wrong), SHRINK_TRIES)
        arguments.failures.mkdir(parents=True, exist_ok=True)
        path = arguments.failures / f"crowd-{small.seed}.json"
        path.write_text(small.write())
        print(f"again: python -m tests.torture.run_crowds --replay {path}   ({len(small.requests)} requests)")
    rig.close()
    figures = {
        "command": " ".join(["python", "-m", "tests.torture.run_crowds", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "block_tokens": BLOCK,
        "kv_blocks": BLOCKS,
        "tolerance": {"keys_and_values": TOLERANCE, "logits": LOGIT_TOLERANCE},
        "model": SMALL,
        "options": OPTIONS,
        **vars(tally),
        "stock_blocks": asdict(stock),
        "counters": {name: count for name, count in steps.items() if count},
        "machine": describe_machine(),
    }
    print(json.dumps(figures, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    return bool(tally.mismatches)


if __name__ == "__main__":
    sys.exit(main())
