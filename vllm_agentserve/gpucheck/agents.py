"""Agents against an engine in a child process, arm by arm."""

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

import msgspec

from vllm_agentserve.bench.closed_loop import ClosedLoop
from vllm_agentserve.bench.drawing import Shape, draw_sessions
from vllm_agentserve.bench.sessions import warm_up_of
from vllm_agentserve.bench.workloads import REACT
from vllm_agentserve.gpucheck.engines import Setting, counters, make_engine


def replay(options: Mapping[str, Any]) -> dict[str, Any]:
    """One arm of one round, in a child process: a warm-up with other tokens, then the agents.

    Args:
        options: `setting` (of `Setting`), `shape` (of `drawing.Shape`), `stagger_s` (between the first starts of two
            agents), `seed` and `round`.
    """
    setting = Setting(**options["setting"])
    began = perf_counter()
    llm = make_engine(setting)
    started_s = perf_counter() - began
    workload = replace(REACT, stagger_s=options["stagger_s"])
    sessions = draw_sessions(workload, Shape(**options["shape"]), options["seed"])
    ClosedLoop(llm.llm_engine, warm_up_of(sessions, str(options["seed"]))).run()
    before = counters(llm)
    loop = ClosedLoop(llm.llm_engine, sessions, setting.arm, options["round"])
    records = loop.run()
    return {
        "records": msgspec.to_builtins(records),
        "seconds": loop.seconds,
        "start_s": started_s,
        "counters": {name: value - before[name] for name, value in counters(llm).items()},
    }
