"""Which of our files and functions a step runs: what a reader of one step has to know.

    python tools/trace_step.py                           # default options
    python tools/trace_step.py --full                    # programs, preemption, kept KV blocks and a prefill lane
    python tools/trace_step.py --without-load-control    # either of them without load control
    python tools/trace_step.py --without-arrivals        # either of them: what runs while requests come is left out

Runs vLLM's scheduler without a model through three arrivals and twenty steps with decodes, prompts and waiting requests, and
without a report to `/metrics`. Every look at the clock finds it 5 ms later, so that every trace is the same. Prints for each file
its lines, and the lines of the functions in it that ran.
"""

import argparse
import inspect
import sys
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_agentserve"
NO_REPORTS = {"stats_interval_ms": 60_000.0}
"""Reports come by the clock, and would be in some traces and not in others."""
DEFAULT: dict[str, Any] = {"mode": "time-sliced"} | NO_REPORTS
PROGRAMS: dict[str, Any] = {"policy": "plas", "program_preempt_share": 0.1, "kv_retain": True}
FULL: dict[str, Any] = {"mode": "lanes", "lane_min_tokens": 100} | PROGRAMS | NO_REPORTS


def traced(full: bool, load_control: bool, arrivals: bool) -> dict[str, set[CodeType]]:
    """The functions that ran, by file; `arrivals`: those that ran while requests came too."""
    from tests.support.lane_driver import LaneDriver
    from tests.support.schedulers import Driver, make_request, make_scheduler
    from vllm_agentserve.scheduler import scheduler as ours

    options = (FULL if full else DEFAULT) | {"load_control": load_control}
    looks = count()
    ours.perf_counter = lambda: 0.005 * next(looks)  # type: ignore[attr-defined]
    scheduler = make_scheduler(options=options, lanes=full, max_num_seqs=4)
    driver = (LaneDriver if full else Driver)(scheduler)
    for number in range(2):
        scheduler.add_request(make_request(f"stream-{number}", 20, max_tokens=500, session="a"))
    for _ in range(40):
        driver.step()
    ran: dict[str, set[CodeType]] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            ran.setdefault(str(path.relative_to(PACKAGE)), set()).add(frame.f_code)

    if arrivals:
        sys.setprofile(note)
    for number in range(3):
        scheduler.add_request(make_request(f"cold-{number}", 3000, max_tokens=3, session="b"))
    sys.setprofile(note)
    for _ in range(20):
        driver.step()
    sys.setprofile(None)
    return ran


def main() -> None:
    parser = argparse.ArgumentParser(description="Which of our files and functions a step runs.")
    parser.add_argument("--full", action="store_true", help="programs, preemption, kept KV blocks and a prefill lane")
    parser.add_argument("--without-load-control", action="store_true", help="without load control")
    parser.add_argument("--without-arrivals", action="store_true", help="without what runs while requests come")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    files = lines_of_files = lines_of_functions = 0
    ran = traced(arguments.full, not arguments.without_load_control, not arguments.without_arrivals)
    for name, codes in sorted(ran.items()):
        length = len((PACKAGE / name).read_text().splitlines())
        own = sum(len(inspect.getsourcelines(code)[0]) for code in codes if not code.co_name.startswith("<"))
        files, lines_of_files, lines_of_functions = files + 1, lines_of_files + length, lines_of_functions + own
        print(f"{name:40} {length:6} {own:6}")
    print(f"{files} files, {lines_of_files} lines, {lines_of_functions} lines of functions that ran")


if __name__ == "__main__":
    main()
