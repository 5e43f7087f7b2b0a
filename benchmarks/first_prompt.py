"""What the warm-up of step sizes (`warm_up_s`) costs at start, and what the first cold prompt beside four streams is spared.

    python -m benchmarks.first_prompt --rounds 3

Engines in this machine's memory without HTTP, each in a process of its own, with and without warm-up in turns. Of each: seconds
until it is ready, memory then and at the end, and the longest steps beside the first four cold prompts, one after the other.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.interference import ENGINE_OPTIONS, STREAM_PROMPT, STREAMS, ours
from vllm_agentserve.bench.measure import quantiles
from vllm_agentserve.bench.server import serving_environment
from vllm_agentserve.processes.starter import call
from vllm_agentserve.toy import make_toy_model

COLD_PROMPTS, COLD_TOKENS = 4, 6144
SETTLE_STEPS = 100


def resident_mib() -> float:
    """Memory of this process, in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def work(options: Mapping[str, Any]) -> dict[str, Any]:
    """One engine, in a child process: `mode`, `tpot_slo_ms`, `warm_up_s` and `seed`."""
    from vllm import LLM, SamplingParams

    given = ours(options["mode"], options["tpot_slo_ms"])
    given["additional_config"]["agentserve"]["warm_up_s"] = options["warm_up_s"]
    began = time.perf_counter()
    engine = LLM(str(make_toy_model()), **ENGINE_OPTIONS, **given).llm_engine
    found: dict[str, Any] = {"start_s": time.perf_counter() - began, "ready_mib": resident_mib(), "steps": []}
    rng = random.Random(options["seed"])

    def add(name: str, length: int, tokens: int) -> None:
        prompt = {"prompt_token_ids": [rng.randrange(3, 4000) for _ in range(length)]}
        engine.add_request(name, prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0))

    for number in range(STREAMS):
        add(f"stream-{number}", STREAM_PROMPT, ENGINE_OPTIONS["max_model_len"] - 2 * STREAM_PROMPT)
    for _ in range(SETTLE_STEPS):
        engine.step()
    for number in range(COLD_PROMPTS):
        name, times, ended = f"cold-{number}", list[float](), False
        add(name, COLD_TOKENS, 1)
        while not ended:
            before = time.perf_counter()
            ended = any(output.request_id == name for output in engine.step())
            times.append((time.perf_counter() - before) * 1000)
        found["steps"].append(quantiles(times) | {"n": len(times)})
        for _ in range(SETTLE_STEPS):
            engine.step()
    return found | {"end_mib": resident_mib()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", choices=("time-sliced", "lanes"), default="time-sliced")
    parser.add_argument("--tpot-slo-ms", type=float, default=20.0)
    parser.add_argument("--warm-up-s", type=float, nargs="+", default=[0.0, 10.0])
    arguments = parser.parse_args()
    environment = serving_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    make_toy_model()
    for number in range(arguments.rounds):
        for warm_up_s in arguments.warm_up_s if number % 2 == 0 else reversed(arguments.warm_up_s):
            options = {"mode": arguments.mode, "tpot_slo_ms": arguments.tpot_slo_ms, "warm_up_s": warm_up_s}
            found = call(f"{__spec__.name}:work", options | {"seed": number}, environment)
            steps = "; ".join(f"p50 {one['p50']:.1f} max {one['max']:.1f} of {one['n']}" for one in found["steps"])
            print(
                f"round {number + 1}, warm_up_s {warm_up_s:g}: ready after {found['start_s']:.1f} s with "
                f"{found['ready_mib']:.0f} MiB, {found['end_mib']:.0f} at the end; steps beside cold prompts in ms: {steps}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
