"""Agents against an engine in a child process, arm by arm."""

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

import msgspec

from vllm_agentserve.bench.closed_loop import ClosedLoop
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.sessions import warm_up_of
from vllm_agentserve.bench.workloads import HeavyTail, Uniform, find_workload
from vllm_agentserve.gpucheck.engines import PRIORITY, Setting, counters, make_engine
from vllm_agentserve.gpucheck.launches import LaunchLog, by_slot, memory, slices

CODING = replace(
    find_workload("coding"),
    turns=Uniform(5, 5),
    system=Uniform(5000, 8000),
    result=HeavyTail(1400, 900, 3500),
    answer=Uniform(60, 160),
    tool_s=Uniform(0.1, 0.6),
    shared=0.1,
)
"""As `coding`, in a minute: long cold prompts, four of five results long enough for the lane, short tools, so that a prompt
always meets streams."""


def replay(options: Mapping[str, Any]) -> dict[str, Any]:
    """One arm of one round, in a child process: a warm-up with other tokens, then the agents.

    Args:
        options: `setting` (of `Setting`), `shape` (of `drawing.WorkloadOptions`), `stagger_s` (between the first starts of two
            agents), `seed` and `round`.
    """
    setting = Setting(**options["setting"])
    log = None
    if setting.device == "cuda":
        import torch

        log = LaunchLog(setting.arm == PRIORITY, torch.cuda)
        log.attach()
    began = perf_counter()
    llm = make_engine(setting)
    started_s = perf_counter() - began
    workload = replace(CODING, stagger_s=options["stagger_s"])
    sessions = draw_sessions(workload, WorkloadOptions(**options["shape"]), options["seed"])
    ClosedLoop(llm.llm_engine, warm_up_of(sessions, str(options["seed"]))).run()
    before = counters()
    if log is not None:
        log.clear()
    loop = ClosedLoop(llm.llm_engine, sessions, setting.arm, options["round"])
    records = loop.run()
    return {
        "records": msgspec.to_builtins(records),
        "seconds": loop.seconds,
        "start_s": started_s,
        "counters": {name: value - before.get(name, 0) for name, value in counters().items()},
        "lane": None
        if log is None
        else {"slots": log.slots, "chunks": by_slot(log.launched()), "slices": slices(log.slices)},
        "memory": None if log is None else memory(torch.cuda),
    }
