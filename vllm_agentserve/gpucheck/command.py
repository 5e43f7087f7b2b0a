"""The command line: which parts run, in which order, within which time; and the exit code."""

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.server import serving_environment
from vllm_agentserve.gpucheck import (
    agents_ab,
    environment,
    equality,
    faults,
    host_tokens,
    imports,
    pressure,
    probe,
    summary,
    throughput,
)
from vllm_agentserve.gpucheck.archive import write_archive
from vllm_agentserve.gpucheck.check_run import CheckRun, PartResult, child_environment, with_crashes
from vllm_agentserve.gpucheck.schedule import Span, allowance
from vllm_agentserve.gpucheck.summary import Done

BUDGET_S = 530.0
"""The least of all parts, and a little more."""

CPU_LEAST = 0.4
"""Without a GPU the check only tests itself: so much of the least times is kept for later parts."""
FAILED, NO_IMPORT, NO_TIME = 1, 3, 4
"""Exit codes; 2 belongs to argparse."""


@dataclass(frozen=True)
class Part:
    """One part.

    Args:
        needed: whether the check ends at once when it fails.
        always: whether it runs whatever parts were asked for.
    """

    title: str
    run: Callable[[CheckRun], PartResult]
    span: Span
    needed: bool = False
    always: bool = False


PARTS = {
    part.span.name: part
    for part in (
        Part("Imports", imports.run, Span("imports", 30, 60), needed=True, always=True),
        # Later parts read from its result how much memory there is.
        Part("Environment", environment.run, Span("environment", 5, 40), always=True),
        Part("Green contexts", probe.run, Span("green", 20, 75)),
        Part("Tokens equal stock vLLM's, as users run it", equality.run_bfloat16, Span("equality", 120, 200)),
        Part("Agents, A/B", agents_ab.run, Span("agents", 180, 600)),
        Part("Faults", faults.run, Span("faults", 60, 150)),
        Part("Tokens equal stock vLLM's, float32", equality.run_float32, Span("equality-float32", 45, 170)),
        Part("Tokens equal stock vLLM's, with host memory", host_tokens.run, Span("host", 40, 150)),
        Part("Throughput against share of the device", throughput.run, Span("shares", 20, 60)),
    )
}
"""The parts of a check, in the order in which they run: those that decide most come first, should the time run out."""
ON_REQUEST = {
    part.span.name: part
    for part in (
        Part("Agents under memory pressure", pressure.run, Span("pressure", 100, 600)),
        Part("Agents under memory pressure, host memory", pressure.run_host, Span("pressure-host", 100, 600)),
    )
}
"""Parts that run only where they are named, after the others."""


def part_of(name: str) -> Part:
    """Raises `KeyError` for a name that no part has."""
    return PARTS[name] if name in PARTS else ON_REQUEST[name]


def chosen_device(wanted: str) -> str:
    """ "cuda" or "cpu"; "auto" is what is there."""
    return wanted if wanted != "auto" else "cuda" if has_nvidia_driver() else "cpu"


def run_parts(check: CheckRun, names: Sequence[str], budget_s: float, command: str) -> list[Done]:
    """Runs the parts called `names`; writes summary and archive after each. A part that raises has failed, and the next one
    runs, unless the part is `needed`. What is ended from outside leaves its summary too, and ends the check."""
    end = time.monotonic() + budget_s
    done: list[Done] = []
    for index, name in enumerate(names):
        part = part_of(name)
        began = time.monotonic()
        later = [part_of(other).span for other in names[index + 1 :]]
        # A longer check is longer in all its parts.
        span = replace(part.span, most_s=part.span.most_s * max(budget_s / BUDGET_S, 1.0))
        if check.device == "cpu":
            later = [replace(one, least_s=one.least_s * CPU_LEAST) for one in later]
        allowed = allowance(span, later, end - began)
        ended = False
        if allowed is None:
            finding = PartResult("not run", f"only {max(end - began, 0.0):.0f} s of the time were left")
        else:
            check.end = began + allowed
            try:
                finding = part.run(check)
            except KeyboardInterrupt:
                finding, ended = PartResult("ran out of time", "the check was ended from outside"), True
            except Exception as error:
                trace = traceback.format_exc().splitlines()
                finding = PartResult("failed", f"{type(error).__name__}: {error}", ["```", *trace, "```"])
        finding = with_crashes(finding, check.forget_crashes())
        done.append(Done(name, part.title, finding, time.monotonic() - began, left_out=allowed is None))
        keep(check.folder, done, command)
        print(f"{part.title}: {finding.status}: {finding.line} ({done[-1].seconds:.0f} s)", flush=True)
        if ended or (part.needed and finding.status == "failed"):
            break
    return done


def keep(folder: Path, done: list[Done], command: str) -> None:
    """Writes summary and archive. A full disk does not end the check: the last of `done` says so, as soon as a summary can be
    written again."""
    try:
        summary.write(folder, done, command)
        write_archive(folder)
    except OSError as error:
        finding = done[-1].finding
        line = f"{finding.line}; its results could not be written: {error}"
        done[-1] = replace(done[-1], finding=replace(finding, line=line), unwritten=True)
        print(f"results could not be written: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            summary.write(folder, done, command)


def exit_code(done: Sequence[Done]) -> int:
    """See `main`."""
    failed = [one.name for one in done if one.finding.status == "failed"]
    if any(part_of(name).needed for name in failed):
        return NO_IMPORT
    # The summary of a part holds everything before it, so only the last one has to have been written.
    if failed or (done and done[-1].unwritten):
        return FAILED
    return NO_TIME if any(one.left_out or one.finding.status == "ran out of time" for one in done) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 when all parts that apply here came to their end and none failed, 1 when one failed or the
    results could not be written, 2 for wrong arguments, 3 when an import failed, 4 when nothing failed but the time did not
    suffice for all."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_agentserve.gpucheck", description="Shows what of vllm_agentserve works on this machine."
    )
    parser.add_argument("--output", type=Path, required=True, help="the results folder, made here")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--small", action="store_true", help="the toy model and few requests: a test of the check itself"
    )
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all parts (default %(default)g)")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[*PARTS, *ON_REQUEST],
        default=list(PARTS),
        help="run only these parts, in the usual order; those under memory pressure run only if they are named",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="engines under memory pressure compile their model, as a server does by default; they take longer to start",
    )
    given = parser.parse_args(arguments)
    if given.device == "cpu" and has_nvidia_driver():
        parser.error("--device cpu is for machines without an NVIDIA driver: vLLM takes the GPU where there is one")
    if given.compiled and not set(given.parts) & set(ON_REQUEST):
        parser.error(f"--compiled is for the parts {' and '.join(ON_REQUEST)}: name one of them with --parts")
    # A plain `kill` unwinds like Ctrl-C, so that no engine is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device = chosen_device(given.device)
    if given.compiled and device == "cpu":
        parser.error("--compiled needs a GPU: without one the check compiles nothing")
    environment_of_children = child_environment(os.environ, serving_environment(base={}))
    check = CheckRun(given.output, device, given.small, environment_of_children, given.compiled)
    names = [name for name, part in {**PARTS, **ON_REQUEST}.items() if name in given.parts or part.always]
    shown = " ".join(["python -m vllm_agentserve.gpucheck", *(sys.argv[1:] if arguments is None else arguments)])
    done = run_parts(check, names, given.budget_s, shown)
    print(f"summary: {given.output / 'summary.md'}")
    return exit_code(done)
