"""How fast streams decode from second to second, with OpenMP threads that spin for longer and shorter between two steps.

    python -m benchmarks.spinning --starts 4 --counts default 3000 --output docs/results/spinning.json

Stock vLLM over HTTP, its worker's threads bound to all cores. Every start of every count is a fresh server, counts in turns.
Each server then decodes the same short streams again and again, with nothing else running: two such times differ only by how the
machine runs the processes. `GOMP_SPINCOUNT` says how often a thread of libgomp looks for work before it sleeps; libgomp's default
is 300000.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances
from benchmarks.interference import STREAM_PROMPT, Load, serve_option
from vllm_agentserve.bench.arguments import add_start_timeout
from vllm_agentserve.bench.client import StreamingClient
from vllm_agentserve.bench.measure import quantiles
from vllm_agentserve.bench.replay import undisturbed
from vllm_agentserve.bench.server import START_TIMEOUT_S, VllmServer
from vllm_agentserve.vllm_compat.cpu import SPIN_COUNT

DEFAULT = "default"
TOKENS = 400
"""Of every stream, each time."""
WARM_UP_TIMES = 1


async def decode(url: str, streams: int, seed: int) -> tuple[float, list[float]]:
    """Decodes all streams once; returns the seconds it took, and all intervals between two tokens in ms."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 4000) for _ in range(STREAM_PROMPT)] for _ in range(streams)]
    async with StreamingClient(url) as client:
        began = time.perf_counter()
        done = await asyncio.gather(*(client.generate("stream", prompt, TOKENS) for prompt in prompts))
        took = time.perf_counter() - began
    return took, [
        (later - one) * 1000 for stream in done for one, later in zip(stream.stamps, stream.stamps[1:], strict=False)
    ]


def serve(count: str, streams: int, times: int, start_timeout_s: float) -> dict[str, Any]:
    """One server. Returns the seconds of each time, quantiles of the intervals, and how many intervals have how many ms."""
    load = Load()
    for name in (SPIN_COUNT, "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    if count != DEFAULT:
        os.environ[SPIN_COUNT] = count
    options = [text for key, value in load.options().items() for text in serve_option(key, value)]
    took, gaps = [], []
    with VllmServer(load.model(), options, start_timeout_s=start_timeout_s) as server, undisturbed():
        for number in range(times + WARM_UP_TIMES):
            seconds, found = asyncio.run(decode(server.url, streams, number))
            if number >= WARM_UP_TIMES:
                took.append(round(seconds, 3))
                gaps += found
    in_ms = Counter(round(gap) for gap in gaps)
    return {
        "seconds": took,
        "itl_ms": {name: round(value, 2) for name, value in quantiles(gaps).items()},
        "intervals": len(gaps),
        "share_of_ms": {ms: round(in_ms[ms] / len(gaps), 3) for ms in sorted(in_ms)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", nargs="+", default=[DEFAULT, "3000"], help=f"of {SPIN_COUNT}; '{DEFAULT}': not set")
    parser.add_argument("--starts", type=int, default=4, help="servers of each count")
    parser.add_argument("--times", type=int, default=10, help="how often each server decodes the streams")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--output", type=Path, help="where everything goes, as JSON")
    add_start_timeout(parser, "a server", START_TIMEOUT_S)
    arguments = parser.parse_args()
    if min(arguments.starts, arguments.times, arguments.streams) < 1:
        parser.error("--starts, --times and --streams are to be 1 or more")
    if arguments.output and not arguments.output.parent.is_dir():
        parser.error(f"--output {arguments.output}: there is no folder {arguments.output.parent}; make it first")
    for count in arguments.counts:
        if count != DEFAULT and not count.isdecimal():
            parser.error(f"--counts {count!r} is neither a number nor '{DEFAULT}'")
    servers: dict[str, list[dict[str, Any]]] = {count: [] for count in arguments.counts}
    for start in range(arguments.starts):
        # Every other start runs backwards, so that no count always follows the same one.
        for count in arguments.counts if start % 2 == 0 else reversed(arguments.counts):
            found = serve(count, arguments.streams, arguments.times, arguments.start_timeout)
            servers[count].append(found)
            print(f"start {start + 1} {count}: {found['seconds']} s, ITL {found['itl_ms']}", flush=True)
    for count, found in servers.items():
        seconds = [one for server in found for one in server["seconds"]]
        print(f"{count}: median {statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f} s")
    if arguments.output:
        conditions = {"streams": arguments.streams, "tokens": TOKENS}
        arguments.output.write_text(json.dumps(circumstances(__spec__.name) | conditions | {"servers": servers}) + "\n")


if __name__ == "__main__":
    main()
