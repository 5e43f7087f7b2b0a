"""The command line: which parts run, in which order, within which time; and the exit code."""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_agentserve.bench.server import has_nvidia_driver, serving_environment
from vllm_agentserve.gpucheck import contest, environment, equality, faults, probe, shares, summary
from vllm_agentserve.gpucheck.place import Finding, Place, child_environment
from vllm_agentserve.gpucheck.schedule import Span, allowance
from vllm_agentserve.gpucheck.summary import Done

BUDGET_S = 470.0


@dataclass(frozen=True)
class Part:
    title: str
    run: Callable[[Place], Finding]
    span: Span


PARTS = {
    part.span.name: part
    for part in (
        Part("Environment", environment.run, Span("environment", 5, 40)),
        Part("Green contexts", probe.run, Span("green", 20, 75)),
        Part("Tokens equal stock vLLM's, as users run it", equality.run_bfloat16, Span("equality", 80, 170)),
        Part("Agents, A/B", contest.run, Span("agents", 80, 600)),
        Part("Faults", faults.run, Span("faults", 30, 90)),
        Part("Tokens equal stock vLLM's, float32", equality.run_float32, Span("equality-float32", 50, 170)),
        Part("Throughput against share of the device", shares.run, Span("shares", 25, 60)),
    )
}
"""All parts, in the order in which they run."""


def chosen_device(wanted: str) -> str:
    """ "cuda" or "cpu"; "auto" is what is there."""
    return wanted if wanted != "auto" else "cuda" if has_nvidia_driver() else "cpu"


def check(place: Place, names: Sequence[str], budget_s: float, command: str) -> list[Done]:
    """Runs the parts called `names`; writes the summary after each. A part that raises has failed, and the next one runs."""
    end = time.monotonic() + budget_s
    done: list[Done] = []
    for index, name in enumerate(names):
        part = PARTS[name]
        began = time.monotonic()
        later = [PARTS[other].span for other in names[index + 1 :]]
        # A longer check is longer in all its parts.
        span = replace(part.span, most_s=part.span.most_s * max(budget_s / BUDGET_S, 1.0))
        allowed = allowance(span, later, end - began)
        if allowed is None:
            finding = Finding("not run", f"only {max(end - began, 0.0):.0f} s of the time were left")
        else:
            place.end = began + allowed
            try:
                finding = part.run(place)
            except Exception as error:
                trace = traceback.format_exc().splitlines()
                finding = Finding("failed", f"{type(error).__name__}: {error}", ["```", *trace, "```"])
        done.append(Done(name, part.title, finding, time.monotonic() - began))
        summary.write(place.folder, done, command)
        print(f"{part.title}: {finding.status}: {finding.line} ({done[-1].seconds:.0f} s)", flush=True)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when nothing failed, 1 when a part did, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_agentserve.gpucheck", description="Shows what of vllm_agentserve holds on this machine."
    )
    parser.add_argument("--output", type=Path, required=True, help="the results folder, made here")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--small", action="store_true", help="the toy model and few requests: a test of the check itself"
    )
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all parts (default %(default)g)")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these, in the usual order"
    )
    given = parser.parse_args(arguments)
    if given.device == "cpu" and has_nvidia_driver():
        parser.error("--device cpu is for machines without an NVIDIA driver: vLLM takes the GPU where there is one")
    # A plain `kill` unwinds like Ctrl-C, so that no engine is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device = chosen_device(given.device)
    place = Place(given.output, device, given.small, child_environment(os.environ, serving_environment(base={})))
    # The others ask the first part how much memory there is.
    names = [name for name in PARTS if name in given.parts or name == "environment"]
    shown = " ".join(["python -m vllm_agentserve.gpucheck", *(sys.argv[1:] if arguments is None else arguments)])
    done = check(place, names, given.budget_s, shown)
    print(f"summary: {given.output / 'summary.md'}")
    return int(any(one.finding.status == "failed" for one in done))
