"""The arguments of `agentserve bench`; nothing heavy is imported here, so that `--help` is quick."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_agentserve.bench.arms import GRAMMAR


def number_from(low: float, high: float, whole: bool = True) -> Callable[[str], Any]:
    """A type for argparse: a number within bounds; the message names the value and the bounds."""

    def parse(text: str) -> float:
        try:
            value: float = int(text if text.isdigit() else "") if whole else float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            kind = "whole number" if whole else "number"
            raise argparse.ArgumentTypeError(f"{text!r} must be a {kind} from {low:g} to {high:g}")
        return value

    return parse


def port_argument(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 1 to 65535")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands of `agentserve bench`."""
    commands = parser.add_subparsers(dest="bench", required=True)
    run = commands.add_parser(
        "run",
        help="measure arms against each other on agent traffic",
        description="Measures arms in turns, round after round, on the same agent traffic, and writes a folder of raw data, "
        "figures, pictures and one HTML page.",
    )
    traffic = run.add_argument_group("traffic")
    traffic.add_argument(
        "--workload", default="react", metavar="NAME", help="see `agentserve bench workloads` (default: %(default)s)"
    )
    traffic.add_argument("--trace", metavar="FILE", help="replay a recorded trace instead; `sample` is a tiny one")
    traffic.add_argument("--agents", type=number_from(1, 1000), help="agents at work at once")
    traffic.add_argument("--sessions", type=number_from(1, 1000), help="runs of each agent, one after the other")
    traffic.add_argument("--turns", type=number_from(1, 1000), help="requests of each run")
    traffic.add_argument(
        "--gap-s",
        type=number_from(0, 3600, whole=False),
        nargs="+",
        metavar="S",
        help="mean time a tool takes, drawn evenly from three to five quarters of it; several: each is measured on every "
        "server, with prompts of its own, into a folder of its own",
    )
    traffic.add_argument(
        "--shared", type=number_from(0, 1, whole=False), help="part of the system prompt all have in common"
    )
    traffic.add_argument(
        "--scale",
        type=number_from(0.001, 100, whole=False),
        help="factor on all lengths (default: 1, less without a GPU)",
    )
    traffic.add_argument("--seed", type=number_from(0, 2**31), default=0, help="(default: %(default)s)")
    traffic.add_argument(
        "--answers",
        choices=("pinned", "fixed", "real"),
        default="pinned",
        help="pinned: of planned length, one allowed token, so that every prompt is the same in every arm; fixed: of planned "
        "length, whatever the model says; real: until the model ends, at most that long (default: %(default)s)",
    )
    traffic.add_argument(
        "--anonymous",
        action="store_true",
        help="send neither session ids nor hints: who belongs together must be inferred",
    )
    traffic.add_argument(
        "--load",
        type=number_from(0.01, 10, whole=False),
        help="sessions arrive at random, as fast as this share of what stock (or the first arm) completes when all come at once, "
        "at the beginning (default: agents begin together); of programs: share of the time in which an engine whose batches "
        "are always full would have work (default: 0.9)",
    )
    traffic.add_argument(
        "--sessions-per-s",
        type=number_from(0.0001, 10_000, whole=False),
        metavar="N",
        help="sessions arrive at random, so many per second on average; instead of --load",
    )
    programs = run.add_argument_group("workloads of programs")
    programs.add_argument("--programs", type=number_from(1, 100_000), help="how many (default: the workload's own)")
    programs.add_argument(
        "--step-cost",
        type=Path,
        metavar="FILE",
        help="what steps cost here, as python -m vllm_agentserve.simulator.agreement writes it in a clone (default: known "
        "for the toy model without a GPU, otherwise a guess)",
    )
    replayed = run.add_argument_group("traces")
    replayed.add_argument(
        "--pace",
        choices=("closed", "open"),
        default="closed",
        help="by answers and delays, or by timestamps (default: closed)",
    )
    replayed.add_argument(
        "--trace-inputs",
        choices=("auto", "whole", "added"),
        default="auto",
        help="what input_length counts in a session",
    )
    replayed.add_argument(
        "--block-tokens",
        type=number_from(1, 65536),
        help="tokens per hash id (default: what the trace says; 16 in Bailian's form, else 512)",
    )
    replayed.add_argument(
        "--time-unit",
        choices=("ms", "s"),
        help="what timestamps and delays are in (default: the form's own: s in Bailian's, else ms)",
    )
    replayed.add_argument("--speed", type=number_from(0.001, 1000, whole=False), default=1.0, help="factor on the pace")
    replayed.add_argument("--limit", type=number_from(1, 10**9), help="only the first so many lines")
    arms = run.add_argument_group("arms", GRAMMAR)
    arms.add_argument("--arms", nargs="*", metavar="ARM", help="the first is the baseline (default: stock agentserve)")
    arms.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="a server somebody else runs, as one more arm"
    )
    arms.add_argument(
        "--api-key", metavar="KEY", help="API key of the servers at --url (default: OPENAI_API_KEY, if it is set)"
    )
    servers = run.add_argument_group("servers")
    servers.add_argument("--model", help="model folder or name (default: a toy model made here)")
    servers.add_argument("--serve", default="", metavar="OPTIONS", help="options of vllm serve for all arms, in quotes")
    servers.add_argument(
        "--kv-gib",
        type=number_from(0.01, 4096, whole=False),
        help="KV cache of every arm (default: 2 without a GPU, else found)",
    )
    servers.add_argument(
        "--kv-tokens",
        type=number_from(1, 10**9),
        help="KV cache of every arm in tokens, rounded up to whole blocks; instead of --kv-gib",
    )
    servers.add_argument("--port", type=port_argument, help="where servers listen (default: a free port)")
    servers.add_argument(
        "--start-timeout",
        type=number_from(1, 86_400, whole=False),
        default=300.0,
        metavar="S",
        help="how long a server may take to start (default: %(default)s)",
    )
    measuring = run.add_argument_group("measuring")
    measuring.add_argument("--rounds", type=number_from(1, 1000), default=3, help="(default: %(default)s)")
    measuring.add_argument(
        "--slo-factor", type=number_from(0, 1000, whole=False), default=3.0,
        help="thresholds are the isolated run times this; 0: no isolated run (default: %(default)s)",
    )  # fmt: skip
    measuring.add_argument(
        "--primary",
        nargs="+",
        metavar="ROW",
        help="one to three rows of the table that decide, by their keys in summary.json (default: session_mean_s "
        "ttft_resume_mean_ms itl_p99_ms; of programs program_mean_ms program_p95_ms tokens_per_s)",
    )
    measuring.add_argument("--output", type=Path, help="folder for the results (default: a new one in bench-results)")
    commands.add_parser("workloads", help="list and explain the workloads")
    beside = commands.add_parser("table", help="print the main figures of several results folders beside each other")
    beside.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="results, or folders that hold results")
    again = commands.add_parser("report", help="compute figures, pictures and page again from a results folder")
    again.add_argument("folder", type=Path)
    again.add_argument("--baseline", metavar="ARM", help="compare with this arm instead of the first")
    again.add_argument("--clean", action="store_true", help="leave out rounds that were polluted in any arm")
