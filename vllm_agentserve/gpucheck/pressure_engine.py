"""An engine in a child process that serves the agents it is asked for, and waits at a socket in between."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from vllm_agentserve.bench.closed_loop import ClosedLoop
from vllm_agentserve.bench.sessions import warm_up_of
from vllm_agentserve.gpucheck.engines import Setting, counters, make_engine
from vllm_agentserve.gpucheck.pressure_cells import WARM_UP_AGENTS, Cell, sessions_of
from vllm_agentserve.gpucheck.standing_task import Answering

SETTLE_STEPS = 4
"""More than an engine has under way at the same time."""
SHOWN = ("load_held_requests", "load_hold_seconds")


def serve(options: Mapping[str, Any]) -> dict[str, Any]:
    """In a child process, until the check closes the socket.

    The first answer has `start_s`, the seconds the engine took to start, and `blocks`, the blocks of its KV cache.

    Args:
        options: `setting` (of `Setting`) and `socket` (its path).
    """
    with Answering(options["socket"]) as asked:
        began = perf_counter()
        engine = make_engine(Setting(**options["setting"])).llm_engine
        start_s = perf_counter() - began
        asked.answer({"start_s": start_s, "blocks": engine.vllm_config.cache_config.num_gpu_blocks})
        for given in asked:
            asked.answer(run(engine, given))
    return {"start_s": start_s}


def run(engine: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """One arm of one round, or the warm-up of a cell.

    Args:
        given: `cell` (of `Cell`), `seed`, `arm`, `round`, `live` (sessions under way at most, or None), `warm_up` (whether this
            is one), and `raw` (the file for all records, compressed; None for no file).
    """
    cell, seed = Cell(**given["cell"]), given["seed"]
    if given["warm_up"]:
        sessions = warm_up_of(sessions_of(replace(cell, agents=min(cell.agents, WARM_UP_AGENTS)), seed), str(seed))
    else:
        sessions = sessions_of(cell, seed)
    before = counters()
    suffix = f"@{cell.name}-{given['round']}"
    loop = ClosedLoop(engine, sessions, given["arm"], given["round"], told=True, live=given["live"], suffix=suffix)
    records = loop.run()
    settle(engine)
    after = counters()
    result = {
        "records": msgspec.to_builtins(records),
        "seconds": loop.seconds,
        "counters": {name: value - before.get(name, 0) for name, value in after.items()},
    }
    if given["raw"] is not None:
        write_packed(Path(given["raw"]), result)
    return {"seconds": loop.seconds, **{name: result["counters"].get(name) for name in SHOWN}}


def settle(engine: Any) -> None:
    """Ends the steps that are still under way when the last answer is there: otherwise they would seem to last until the next
    round begins."""
    for _ in range(SETTLE_STEPS):
        engine.step()


def write_packed(path: Path, result: Mapping[str, Any]) -> None:
    """Writes it as compressed JSON, in one move, so that a file that is there is whole."""
    partial = path.with_suffix(".part")
    partial.write_bytes(gzip.compress(json.dumps(result).encode(), mtime=0))
    partial.replace(path)


def read_packed(path: Path) -> dict[str, Any]:
    """What `write_packed` has written."""
    return dict(json.loads(gzip.decompress(path.read_bytes())))
