"""`agentserve demo`: the same agents against stock vLLM and against vLLM with our flag, and one table."""

import asyncio
import json
import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_agentserve.bench.measure import quantiles, split_gaps
from vllm_agentserve.bench.server import VllmServer, has_nvidia_driver
from vllm_agentserve.bench.workload import AgentPlan, Replay, plan_agents, replay
from vllm_agentserve.vllm_compat import SCHEDULER_NAME

SERVE_OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "16384", "--max-num-seqs", "32", "--enforce-eager")
CPU_OPTIONS = ("--kv-cache-memory-bytes", str(2 << 30))


@dataclass(frozen=True)
class Figures:
    """One arm in numbers: intervals in ms, times to the first token in s."""

    itl_during_ms: dict[str, float]
    itl_quiet_p50_ms: float
    ttft_cold_s: float
    ttft_resume_s: float
    tokens_per_s: float
    sessions_finished: int


def figures(result: Replay) -> Figures:
    """Computes the figures of a replay; means for times to the first token."""
    prefills = [
        (stream, stream.sent, stream.stamps[0]) for stream in result.streams if stream.kind == "cold" and stream.stamps
    ]
    gaps = split_gaps(result.streams, prefills)

    def mean_ttft(kind: str) -> float:
        times = [stream.ttft for stream in result.streams if stream.kind == kind and stream.stamps]
        return sum(times) / len(times) if times else math.nan

    tokens = sum(len(stream.token_ids) for stream in result.streams)
    return Figures(
        quantiles(gaps.during),
        quantiles(gaps.quiet)["p50"],
        mean_ttft("cold"),
        mean_ttft("resume"),
        tokens / (result.ended - result.began),
        result.sessions_finished,
    )


def comparison(stock: Figures, ours: Figures) -> Table:
    """The table of both arms; the last column says how many times better ours is (below 1: worse)."""
    table = Table(title="The same agents, the same requests")
    table.add_column("")
    for name in ("stock vLLM", "with agentserve", "better by"):
        table.add_column(name, justify="right")

    def row(label: str, a: float, b: float, unit: str, more_is_better: bool = False) -> None:
        ratio = (b / a if more_is_better else a / b) if a and b else math.nan
        table.add_row(label, f"{a:.1f} {unit}", f"{b:.1f} {unit}", f"x {ratio:.2f}")

    for name in ("p50", "p95", "p99", "max"):
        label = f"gap between tokens during others' cold prefills, {name}"
        row(label, stock.itl_during_ms[name], ours.itl_during_ms[name], "ms")
    row("gap between tokens at other times, p50", stock.itl_quiet_p50_ms, ours.itl_quiet_p50_ms, "ms")
    row("time to first token, cold turn, mean", stock.ttft_cold_s * 1000, ours.ttft_cold_s * 1000, "ms")
    row("time to first token, resume turn, mean", stock.ttft_resume_s * 1000, ours.ttft_resume_s * 1000, "ms")
    row("generated tokens per second", stock.tokens_per_s, ours.tokens_per_s, "", more_is_better=True)
    row("sessions finished", stock.sessions_finished, ours.sessions_finished, "", more_is_better=True)
    return table


def sentence(stock: Figures, ours: Figures) -> str:
    """What the table means, in one sentence."""
    before, after = stock.itl_during_ms["p99"], ours.itl_during_ms["p99"]
    cold, resume = ours.ttft_cold_s / stock.ttft_cold_s, ours.ttft_resume_s / stock.ttft_resume_s

    def times(ratio: float) -> str:
        return f"{ratio:.2f} times as long"

    return (
        f"While one agent's prompt is read, the others' worst gaps (p99) go from {before:.0f} ms to {after:.0f} ms; "
        f"that agent's first token takes {times(cold)}, "
        f"and an agent that comes back from a tool waits {times(resume)} for its next one."
    )


def run_arm(
    name: str, model: Path, options: list[str], plans: list[AgentPlan], progress: Progress, port: int | None
) -> Replay:
    """Starts a server, replays the agents and stops the server."""
    turns = sum(len(plan.answers) for plan in plans)
    task = progress.add_task(f"{name}: starting the server", total=turns)
    with VllmServer(model, options, port=port) as server:
        progress.update(task, description=f"{name}: agents at work")
        result = asyncio.run(replay(server.url, plans, on_turn=lambda: progress.advance(task)))
        progress.update(task, description=f"{name}: stopping the server")
    progress.update(task, description=f"{name}: done")
    return result


def run_demo(
    model: Path, agents: int, turns: int, port: int | None, options: dict[str, object], console: Console
) -> tuple[Figures, Figures]:
    """Runs both arms one after the other and prints the table; returns their figures.

    Raises:
        ServerError: a server did not start.
        StreamError: a request failed.
    """
    plans = plan_agents(agents=agents, turns=turns)
    serve = [*SERVE_OPTIONS, *(() if has_nvidia_driver() else CPU_OPTIONS)]
    ours_serve = [*serve, "--scheduler-cls", SCHEDULER_NAME]
    if options:
        ours_serve += ["--additional-config", json.dumps({"agentserve": options})]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} turns"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        stock = figures(run_arm("stock vLLM", model, serve, plans, progress, port))
        ours = figures(run_arm("with agentserve", model, ours_serve, plans, progress, port))
    console.print(comparison(stock, ours))
    console.print(sentence(stock, ours), soft_wrap=True)
    return stock, ours
