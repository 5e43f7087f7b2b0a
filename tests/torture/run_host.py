"""Random calls over host memory behind a small KV cache: in every step the KV of each context that is read is compared with what
was computed. On vLLM's scheduler and connector with our copies; no model is needed.

    python -m tests.torture.run_host --blocks 10000000 --output docs/results/torture-host.json

Every policy of host memory, with room for little and for much, with KV blocks kept or not, with load control and a reserve for
critical calls or without, and with asynchronous scheduling or without it, in turns. After each run all KV blocks are free, and
nobody reads or writes a copy. The exit code is 1 if anything is wrong.
"""

import argparse
import itertools
import json
import random
import sys
import time
from pathlib import Path

import tests.support.environment  # noqa: F401
from tests.support.host_calls import random_calls, started
from tests.support.schedulers import BLOCK
from vllm_agentserve.bench.arms import HOST_POLICIES
from vllm_agentserve.bench.machine import describe_machine

ROOMS = (40, 512)
"""Blocks that host memory has room for; the KV cache has 48."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1_000_000, help="compare at least so many (default: 1000000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    total = dict.fromkeys(("runs", "blocks", "calls", "restored_prompts", "stored_tokens"), 0)
    wrong: list[str] = []
    began = time.monotonic()
    kinds = itertools.cycle(itertools.product(HOST_POLICIES, ROOMS, *[(False, True)] * 4))
    for seed, (policy, room, retains, reserves, controls, asynchronous) in zip(
        itertools.count(arguments.seed), kinds, strict=False
    ):
        scheduler, driver = started(
            num_blocks=49,
            chunks=room,
            holds=True,
            max_num_seqs=5,
            asynchronous=asynchronous,
            tpot_slo_ms=50.0,
            kv_retain=retains,
            kv_host_policy=policy,
            kv_reserve_share=0.3 * reserves,
            load_control=controls,
        )
        try:
            random_calls(scheduler, driver, random.Random(seed), ends=0.1, critical=0.3)
        except Exception as error:
            kind = (
                f"{policy}, {room} blocks, retain {retains}, reserve {reserves}, load {controls}, async {asynchronous}"
            )
            wrong.append(f"seed {seed}, {kind}: {error!r}")
            print(wrong[-1], flush=True)
        counts = scheduler.counts
        total["runs"] += 1
        total["blocks"] += driver.checked // BLOCK
        total["calls"] += int(counts["cold_prefill_requests"] + counts["resume_prefill_requests"])
        total["restored_prompts"] += int(counts["host_restored_requests"])
        total["stored_tokens"] += int(counts["host_stored_tokens"])
        driver.close()
        if total["blocks"] >= arguments.blocks or len(wrong) >= 10:
            break
    figures = {
        "command": " ".join(["python", "-m", "tests.torture.run_host", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - began, 1),
        "block_tokens": BLOCK,
        **total,
        "wrong": wrong,
        "machine": describe_machine(),
    }
    print(json.dumps(figures, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
