"""`agentserve demo`: the same agents against stock vLLM and against vLLM with our flag, and what it means in one sentence."""

import sys
from typing import Any

from rich.console import Console

from vllm_agentserve.bench.arms import Arm, scheduler_options
from vllm_agentserve.bench.command import base_options, check_model, scale_of
from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.kv_pool import kv_bytes
from vllm_agentserve.bench.plan import Cell, Plan
from vllm_agentserve.bench.run import new_folder, run_plan
from vllm_agentserve.bench.server import START_TIMEOUT_S
from vllm_agentserve.bench.sessions import Session
from vllm_agentserve.bench.summary import Analysis
from vllm_agentserve.bench.workloads import REACT


def demo_plan(
    model: str,
    toy: bool,
    agents: int,
    turns: int,
    port: int | None,
    settings: dict[str, Any],
    start_timeout_s: float = START_TIMEOUT_S,
) -> Plan:
    """One round of `react` on both arms, without the isolated run.

    Raises:
        WorkloadError: the model cannot serve it.
    """
    chosen = WorkloadOptions(agents=agents, sessions=1, turns=turns, scale=scale_of(REACT))

    def drawn(number: int) -> list[Session]:
        return draw_sessions(REACT, chosen, number)

    workload = {"name": REACT.name, "scale": f"{chosen.scale:g}", "agents": agents, "sessions": 1, "turns": turns}
    plan = Plan(
        arms=[Arm("stock"), Arm("agentserve", scheduler_options(settings), settings=settings)],
        cells=[Cell("", drawn, workload)],
        model=model,
        serve=base_options(toy),
        kv_bytes=kv_bytes(None, has_nvidia_driver()),
        port=port,
        rounds=1,
        slo_factor=0.0,
        start_timeout_s=start_timeout_s,
        command=("agentserve", *sys.argv[1:]),
    )
    check_model(model, plan)
    return plan


def run_demo(plan: Plan, console: Console) -> int:
    """Runs both arms, prints the table and the sentence; returns the exit code."""
    return run_plan(plan, new_folder("demo"), console, sentence)


def sentence(analysis: Analysis) -> str:
    """What the table means, in one sentence; empty unless both arms ended."""
    stock, ours = (analysis.summary["arms"][name]["figures"] for name in analysis.figures)
    gap, which = "itl_cold_p99_ms", "worst gaps (p99) go"
    if any(figures[gap] is None for figures in (stock, ours)):
        gap, which = "itl_cold_max_ms", "worst gap goes"
    cold, resume = "ttft_cold_mean_ms", "ttft_resume_mean_ms"
    if any(figures.get(name) is None for figures in (stock, ours) for name in (gap, cold, resume)):
        return ""
    return (
        f"While one agent's prompt is read, the others' {which} from {stock[gap]:.0f} ms to {ours[gap]:.0f} ms; "
        f"that agent's first token takes {ours[cold] / stock[cold]:.2f} times as long, "
        f"and an agent that comes back from a tool waits {ours[resume] / stock[resume]:.2f} times as long for its next one."
    )
