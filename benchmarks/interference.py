"""One agent's cold prompt against four agents' streams: the problem in its purest form, measured A B A B.

    python -m benchmarks.interference --path engine --rounds 3 --output docs/results/NAME.json
    python -m benchmarks.interference --path http   --rounds 3 --output docs/results/NAME.json

Four streams decode; prompts of 4k, 6k and 8k fresh tokens arrive every six seconds; afterwards such prompts come alone,
twice, and the second time counts: arms have met other chunk sizes until then, and kernels prepare themselves for each.
Every arm of every round is a fresh engine, so the first cold prompt after start is in the figures. `--path alone` leaves
the streams and the first part out. With `--resumes` one more agent takes short turns all the while, each 48 new tokens on a
cached context, and the time to their first token beside a cold prompt is measured too (over HTTP only).
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances
from benchmarks.interference_figures import Run, alone_summary, ratios, rounded, summary, table
from vllm_agentserve.bench.arguments import add_start_timeout
from vllm_agentserve.bench.client import Stream, StreamingClient
from vllm_agentserve.bench.endpoint import read_counters
from vllm_agentserve.bench.measure import quantiles, split_gaps
from vllm_agentserve.bench.replay import undisturbed
from vllm_agentserve.bench.server import START_TIMEOUT_S, VllmServer, serving_environment
from vllm_agentserve.config import SERIES
from vllm_agentserve.processes.starter import call
from vllm_agentserve.shapes import SHAPES, make_shaped_model
from vllm_agentserve.toy import make_toy_model
from vllm_agentserve.vllm_compat import SCHEDULER_NAME

STREAMS = 4
STREAM_PROMPT = 64
CONTEXT, RESULT, PAUSE_S = 1024, 48, 0.15
"""Of the agent that takes short turns: first context, tokens of a turn, time between two."""
MAX_MODEL_LEN = 12288
ENGINE_OPTIONS = {
    "dtype": "bfloat16",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 2 << 30,
    "enforce_eager": True,
}


@dataclass(frozen=True)
class Load:
    """What meets the streams, and the model.

    Args:
        shape: of `vllm_agentserve.shapes`, with dummy weights; None for the toy model.
        prompts: lengths of the cold prompts, in tokens.
        every_s: seconds between two of them.
    """

    shape: str | None = None
    prompts: tuple[int, ...] = (4096, 6144, 8192)
    every_s: float = 6.0

    def model(self) -> Path:
        """Its folder, made where it is not there yet."""
        return make_toy_model() if self.shape is None else make_shaped_model(self.shape)

    def options(self) -> dict[str, Any]:
        """Of every engine."""
        return ENGINE_OPTIONS if self.shape is None else {**ENGINE_OPTIONS, "load_format": "dummy"}


def ours(mode: str, target_ms: float | None = None) -> dict[str, Any]:
    """Args: a mode, and its target; without one that of the default options."""
    target = {} if target_ms is None else {"tpot_slo_ms": target_ms}
    return {"scheduler_cls": SCHEDULER_NAME, "additional_config": {"agentserve": {"mode": mode, **target}}}


USUAL: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock-chunk=256": {"max_num_batched_tokens": 256},
    "lanes": ours("lanes", 40),
    **{f"{mode}-{target}ms": ours(mode, target) for mode in ("time-sliced", "auto") for target in (40, 20, 12)},
}
ARMS = {
    **USUAL,
    # For larger models, whose steps take longer.
    "stock-chunk=64": {"max_num_batched_tokens": 64},
    "defaults": {"scheduler_cls": SCHEDULER_NAME},
    "lanes-untold": ours("lanes"),
    **{f"{mode}-100ms": ours(mode, 100) for mode in ("time-sliced", "auto", "lanes")},
}


@dataclass(frozen=True)
class Prompts:
    """Fresh prompts, the same for every arm: the streams', the cold ones, and those that come alone."""

    streams: list[list[int]]
    cold: list[list[int]]
    alone: list[list[int]]

    @classmethod
    def drawn(cls, seed: int, load: Load) -> "Prompts":
        rng = random.Random(seed)

        def of(lengths: Iterable[int]) -> list[list[int]]:
            return [[rng.randrange(3, 4000) for _ in range(length)] for length in lengths]

        return cls(of([STREAM_PROMPT] * STREAMS), of(load.prompts), of((*load.prompts, *load.prompts)))


TOO_SLOW = "a cold prompt was not computed before the end: give more seconds with --every, or shorter --prompts"


async def take_turns(client: StreamingClient, seed: int, turns: list[Stream]) -> None:
    """One more agent, until it is cancelled."""
    rng = random.Random(f"turns {seed}")
    context = [rng.randrange(3, 4000) for _ in range(CONTEXT)]
    while True:
        turns.append(await client.generate("turn", context, 2))
        context += [rng.randrange(3, 4000) for _ in range(RESULT)]
        await asyncio.sleep(PAUSE_S)


async def run_http(url: str, seed: int, load: Load, resumes: bool = False) -> Run:
    """Runs the workload against a server."""
    prompts = Prompts.drawn(seed, load)
    run = Run()
    async with StreamingClient(url) as client:
        await client.generate("warm-up", [7] * 32, 4)
        streams = [Stream("stream", 0.0) for _ in range(STREAMS)]
        tasks = [
            asyncio.create_task(client.generate("stream", prompt, MAX_MODEL_LEN - 2 * STREAM_PROMPT, into=stream))
            for prompt, stream in zip(prompts.streams, streams, strict=True)
        ]
        turns: list[Stream] = []
        agent = asyncio.create_task(take_turns(client, seed, turns)) if resumes else None
        await asyncio.sleep(2.0)
        begin = time.perf_counter()
        colds: list[Stream] = []
        for index, prompt in enumerate(prompts.cold):
            await asyncio.sleep(max(begin + index * load.every_s - time.perf_counter(), 0.0))
            colds.append(await client.generate("cold", prompt, 1))
            run.cold_ttft_s.append((len(prompt), colds[-1].ttft))
        await asyncio.sleep(max(begin + len(load.prompts) * load.every_s - time.perf_counter(), 0.0))
        end = time.perf_counter()
        if any(task.done() for task in tasks):
            raise RuntimeError("a stream ended before the cold prompts: raise max_model_len")
        if agent is not None and agent.done():
            raise RuntimeError("the agent that takes turns stopped") from agent.exception()
        stopped = [*tasks, agent] if agent is not None else tasks
        for task in stopped:
            task.cancel()
        await asyncio.gather(*stopped, return_exceptions=True)
        for stream in streams:
            stream.stamps = [stamp for stamp in stream.stamps if begin <= stamp <= end]
        gaps = split_gaps(streams, [(cold.sent, cold.stamps[0]) for cold in colds])
        first = split_gaps(streams, [(colds[0].sent, colds[0].stamps[0])])
        run.during_ms, run.quiet_ms, run.first_during_ms = gaps.during, gaps.quiet, first.during
        run.resume_ttft_s = [
            turn.ttft
            for turn in turns
            if any(turn.sent < cold.stamps[0] and cold.sent < turn.stamps[0] for cold in colds)
        ]
        run.decode_tokens = sum(len(stream.stamps) for stream in streams)
        run.decode_s = end - begin
        await asyncio.sleep(1.0)
        for prompt in prompts.alone:
            alone = await client.generate("alone", prompt, 1)
            run.alone_ttft_s.append((len(prompt), alone.ttft))
    run.counts = {name: value for name, value in read_counters(url).items() if "agentserve" in name and value}
    del run.alone_ttft_s[: len(load.prompts)]
    return run


def run_engine(arm: str, seed: int, load: Load, only_alone: bool = False) -> Run:
    """Runs the workload in this process, in step with the engine; call it in a process of its own."""
    from vllm import LLM, SamplingParams

    engine = LLM(str(load.model()), **load.options(), **ARMS[arm]).llm_engine
    prompts = Prompts.drawn(seed, load)
    numbers = itertools.count()

    def add(kind: str, prompt: list[int], max_tokens: int) -> str:
        name = f"{kind}-{next(numbers)}"
        parameters = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
        engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        return name

    def beside_streams() -> None:
        names = [add("stream", prompt, MAX_MODEL_LEN - 2 * STREAM_PROMPT) for prompt in prompts.streams]
        warm = time.perf_counter() + 2.0
        while time.perf_counter() < warm:
            engine.step()
        begin = last = time.perf_counter()
        cold: tuple[str, int, float] | None = None
        due = 0
        while (now := time.perf_counter()) < begin + len(load.prompts) * load.every_s:
            if due < len(load.prompts) and now >= begin + due * load.every_s and cold is None:
                prompt, due = prompts.cold[due], due + 1
                cold = (add("cold", prompt, 1), len(prompt), now)
            outputs = engine.step()
            now = time.perf_counter()
            decoded = sum(output.request_id.startswith("stream") for output in outputs)
            if decoded:
                gap = (now - last) * 1000
                (run.quiet_ms if cold is None else run.during_ms).append(gap)
                if cold is not None and due == 1:
                    run.first_during_ms.append(gap)
                last = now
                run.decode_tokens += decoded
            if cold is not None and any(output.request_id == cold[0] for output in outputs):
                run.cold_ttft_s.append((cold[1], now - cold[2]))
                cold = None
        if len(run.cold_ttft_s) < len(prompts.cold):
            raise RuntimeError(TOO_SLOW)
        run.decode_s = now - begin
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()

    run = Run()
    if not only_alone:
        beside_streams()
    for prompt in prompts.alone:
        begin = time.perf_counter()
        add("alone", prompt, 1)
        while engine.has_unfinished_requests():
            engine.step()
        run.alone_ttft_s.append((len(prompt), time.perf_counter() - begin))
    scheduler = engine.engine_core.engine_core.scheduler
    run.counts = {f"{SERIES}{name}": count for name, count in getattr(scheduler, "counts", {}).items() if count}
    del run.alone_ttft_s[: len(load.prompts)]
    return run


def run_arm(
    path: str, arm: str, seed: int, load: Load, resumes: bool = False, start_timeout_s: float = START_TIMEOUT_S
) -> Run:
    """Runs one arm in processes of its own and returns what it gave."""
    if path == "http":
        options = [text for key, value in {**load.options(), **ARMS[arm]}.items() for text in serve_option(key, value)]
        with VllmServer(load.model(), options, start_timeout_s=start_timeout_s) as server, undisturbed():
            return asyncio.run(run_http(server.url, seed, load, resumes))
    environment = serving_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    return Run(
        **call(f"{__spec__.name}:work", {"arm": arm, "seed": seed, "path": path, "load": asdict(load)}, environment)
    )


def work(options: Mapping[str, Any]) -> dict[str, Any]:
    """One arm on an engine, in the child process; `options` are those of `run_arm`."""
    given = options["load"]
    load = Load(given["shape"], tuple(given["prompts"]), given["every_s"])
    return asdict(run_engine(options["arm"], options["seed"], load, only_alone=options["path"] == "alone"))


def serve_option(key: str, value: Any) -> list[str]:
    name = "--" + key.replace("_", "-")
    if value is True:
        return [name]
    return [name, json.dumps(value) if isinstance(value, dict) else str(value)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", choices=("engine", "http", "alone"), default="engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(USUAL))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resumes", action="store_true", help="one more agent takes short turns; with --path http")
    parser.add_argument(
        "--shape",
        choices=[shape.name for shape in SHAPES],
        help="a model of this size with random weights instead of the toy model",
    )
    usual = Load()
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=usual.prompts, help="lengths of the cold prompts, in tokens"
    )
    parser.add_argument("--every", type=float, default=usual.every_s, help="seconds between two of them")
    parser.add_argument("--output", type=Path, help="where the raw intervals and the summary go, as JSON")
    add_start_timeout(parser, "a server, with --path http,", START_TIMEOUT_S)
    arguments = parser.parse_args()
    if arguments.resumes and arguments.path != "http":
        parser.error(
            f"--resumes is measured over HTTP, not with --path {arguments.path}: leave it out, or say --path http"
        )
    if min(arguments.prompts) < 1 or max(arguments.prompts) > MAX_MODEL_LEN - 1:
        parser.error(f"--prompts {arguments.prompts}: the lengths are to be from 1 to {MAX_MODEL_LEN - 1} tokens")
    if not 0 < arguments.every < math.inf:
        parser.error(f"--every {arguments.every} is no time: give seconds above 0")
    load = Load(arguments.shape, tuple(arguments.prompts), arguments.every)
    # A plain `kill` unwinds like Ctrl-C, so that no server is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load.model()
    runs: dict[str, list[Run]] = {arm: [] for arm in arguments.arms}
    for number in range(arguments.rounds):
        # Every other round runs backwards, so that no arm always follows the same one.
        for arm in arguments.arms if number % 2 == 0 else reversed(arguments.arms):
            run = run_arm(
                arguments.path, arm, arguments.seed + number, load, arguments.resumes, arguments.start_timeout
            )
            runs[arm].append(run)
            if arguments.path == "alone":
                print(
                    f"round {number + 1} {arm}: {[round(seconds, 3) for _, seconds in run.alone_ttft_s]} s", flush=True
                )
                continue
            q = quantiles(run.during_ms)
            during = f"{len(run.during_ms)} intervals beside a prefill, p50 {q['p50']:.1f} max {q['max']:.1f} ms"
            print(f"round {number + 1} {arm}: {during}", flush=True)
    arms: dict[str, dict[str, Any]]
    compared: dict[str, Any]
    if arguments.path == "alone":
        arms = {arm: alone_summary(done) for arm, done in runs.items()}
        compared = {
            arm: round(figures["alone_ttft_mean_s"] / arms["stock"]["alone_ttft_mean_s"], 3)
            for arm, figures in arms.items()
        }
        print(json.dumps({"arms": arms, "alone_ttft_arm_over_stock": compared}, indent=1))
    else:
        arms = {arm: summary(done) for arm, done in runs.items()}
        compared = ratios(arms) if "stock" in arms else {}
        print(table(arms))
        print(json.dumps(compared, indent=1))
    if arguments.output:
        report = {
            **circumstances(__spec__.name),
            "load": asdict(load),
            "arms": arms,
            "ratios": compared,
            "runs": {arm: [rounded(asdict(run)) for run in done] for arm, done in runs.items()},
        }
        arguments.output.write_text(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
