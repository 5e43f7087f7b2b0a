"""Memory of a replay: a synthetic trace as large as Mooncake's conversation trace is read and replayed, without a server.

    python -m benchmarks.trace_memory [--speed 40]

The client of the replay answers after 0.1 s with one token. Prints time and peak resident memory after every part.
"""

import argparse
import asyncio
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.sessions import longest_context, warm_up_of
from vllm_agentserve.bench.trace import TraceOptions, read_trace

REQUESTS, HOUR_MS = 12_031, 3_600_000


def write_trace(path: Path) -> int:
    """Writes the trace; half of the prompts begin with blocks of an earlier one. Returns the tokens of all prompts."""
    rng = random.Random(1)
    tokens, fresh = 0, 0
    earlier: list[list[int]] = []
    with path.open("w") as file:
        for number in range(REQUESTS):
            length = max(900, min(int(rng.lognormvariate(8.8, 1.05)), 126_000))
            blocks = -(-length // 512)
            ids = [0] if number else []
            if earlier and rng.random() < 0.5:
                old = rng.choice(earlier)
                ids = old[: rng.randrange(1, min(len(old), blocks) + 1)]
            missing = blocks - len(ids)
            ids = [*ids, *range(fresh + 1, fresh + 1 + missing)]
            fresh, tokens = fresh + missing, tokens + length
            earlier = [*earlier[-399:], ids]
            line = {"timestamp": number * HOUR_MS // REQUESTS, "input_length": length, "output_length": 100}
            file.write(json.dumps(line | {"hash_ids": ids}) + "\n")
    return tokens


class Instant:
    """A client whose server answers every request with one token."""

    async def generate(self, kind: str, prompt: Any, max_tokens: int, *given: Any, **more: Any) -> None:
        stream = given[1]
        stream.sent = time.perf_counter() if more.get("due") is None else more["due"]
        await asyncio.sleep(0.1)
        stream.stamps = [time.perf_counter()]
        stream.finished = stream.stamps[0]


def say(what: str, began: float) -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - began:.1f} s, peak {peak:.2f} GiB", flush=True)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=float, default=40.0, help="factor on the pace (default: %(default)s)")
    speed = parser.parse_args().speed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        print(f"{REQUESTS:,} requests, {write_trace(path):,} tokens, {path.stat().st_size:,} bytes")
        began = time.perf_counter()
        sessions = read_trace(path, TraceOptions(pace="open", speed=speed), 0)
        began = say("read", began)
        longest_context(sessions)
        began = say(f"warm-up of {len(warm_up_of(sessions, '0'))} sessions planned", began)
        replay = Replay(Instant(), sessions)  # type: ignore[arg-type]
        uvloop.run(replay.run())
        say(f"{len(replay.records):,} requests replayed", began)


if __name__ == "__main__":
    main()
