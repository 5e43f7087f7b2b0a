"""The simulator held against the real engine: the same programs, the same policies, in one process and in real time.

    python -m vllm_agentserve.simulator.agreement --programs 48 --load 0.9 --output agreement.json

First the engine's steps are timed, alone and with prompts, which gives the simulator its cost. Then every policy runs the
programs on a fresh engine, arrivals and tools in real time; then the simulator runs them. What is compared first is the time
programs wait without their tools: tools take the same time on both sides, and so does the last arrival, which decides when all
are through. The file with the cost, `--cost`,
is what `agentserve bench run --step-cost` reads; where it exists already, nothing is timed.

    python -m vllm_agentserve.simulator.agreement --recorded agreement.json

Programs, cost and figures of the engine are those of an earlier run; only the simulator runs again.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from vllm_agentserve.bench.calls import ProgramShape, in_blocks, tool_chain_s
from vllm_agentserve.bench.cost import StepCost, read_cost, write_cost
from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.measure import quantiles
from vllm_agentserve.bench.program_figures import program_figures
from vllm_agentserve.bench.program_traffic import PROGRAM_WORKLOADS, ProgramOptions, sessions_of
from vllm_agentserve.bench.server import serving_environment
from vllm_agentserve.bench.sessions import longest_context, warm_up_of
from vllm_agentserve.processes.starter import call
from vllm_agentserve.simulator.calls import Ended
from vllm_agentserve.simulator.policies import simulate
from vllm_agentserve.simulator.simulator import Order
from vllm_agentserve.toy import make_toy_model
from vllm_agentserve.vllm_compat import SCHEDULER_NAME, installed_vllm

POLICIES = ("stock", "fcfs", "plas", "atlas")
CALIBRATION_TOKENS = 2048
WAITING = "waiting without tools"
FIGURES = (WAITING, "mean", "p95", "makespan s")
"""What is printed; all but the last in ms per generated token."""


def engine_options(given: Mapping[str, Any], policy: str, tokens: int) -> dict[str, Any]:
    """Arguments of `LLM` for a policy, or for `calibration`, with room for sequences of so many tokens."""
    own: dict[str, Any] = {"mode": "stock"} if policy == "calibration" else {"mode": "time-sliced", "policy": policy}
    if policy in ("plas", "atlas"):
        own |= {"program_quantum_ms": given["quantum_ms"]}
    ours = {"scheduler_cls": SCHEDULER_NAME, "additional_config": {"agentserve": own}}
    return {
        "dtype": "bfloat16",
        "max_model_len": -(-tokens // 256) * 256,
        "max_num_seqs": given["slots"],
        "block_size": given["block_size"],
        "kv_cache_memory_bytes": 2 << 30,
        "enforce_eager": not has_nvidia_driver(),
        "skip_tokenizer_init": True,
        **({} if policy == "stock" else ours),
    }


def make_engine(given: Mapping[str, Any], policy: str, tokens: int) -> Any:
    """An `LLMEngine` in this process, which should end with it."""
    from vllm import LLM

    from vllm_agentserve import plugin

    plugin.register()
    return LLM(str(given["model"] or make_toy_model()), **engine_options(given, policy, tokens)).llm_engine


def calibrate(given: Mapping[str, Any]) -> dict[str, Any]:
    """In a child process: times steps; returns the cost, how well it fits, and the samples."""
    from vllm_agentserve.simulator.calibration import Calibration, fit, misfit

    samples = Calibration(
        make_engine(given, "calibration", CALIBRATION_TOKENS), given["slots"], CALIBRATION_TOKENS - 256, given["seed"]
    ).run()
    cost = fit(samples)
    return {"cost": asdict(cost), "misfit": misfit(cost, samples), "samples": [asdict(sample) for sample in samples]}


def run_engine(given: Mapping[str, Any], policy: str, number: int) -> dict[str, Any]:
    """In a child process: one policy in one round, in real time, after a warm-up with other tokens."""
    import msgspec

    from vllm_agentserve.bench.closed_loop import ClosedLoop

    shapes, seed = drawn(given, number), given["seed"] * 1000 + number
    sessions = [session for shape in shapes for session in sessions_of(shape, seed)]
    engine = make_engine(given, policy, longest_context(sessions) + 64)
    ClosedLoop(engine, warm_up_of(sessions, str(seed))).run()
    scheduler = engine.engine_core.engine_core.scheduler
    before = dict(getattr(scheduler, "counts", {}))
    loop = ClosedLoop(engine, sessions, policy, number, told=not given["anonymous"])
    records = loop.run()
    counts = {
        name: value - before.get(name, 0)
        for name, value in getattr(scheduler, "counts", {}).items()
        if value != before.get(name, 0)
    }
    return {
        "records": msgspec.to_builtins(records),
        "step_tokens": scheduler.max_num_scheduled_tokens,
        "counts": counts,
    }


def drawn(given: Mapping[str, Any], number: int) -> list[ProgramShape]:
    chosen = ProgramOptions(
        given["programs"],
        given["load"],
        given["scale"],
        StepCost(**given["cost"]),
        given["slots"],
        given["block_size"],
    )
    return chosen.shapes(PROGRAM_WORKLOADS[given["workload"]], given["seed"] * 1000 + number)


def measured(records: Sequence[Any], shapes: Sequence[ProgramShape]) -> dict[str, float]:
    """Completion time per token in ms and the time until all programs were through in s, from their arrivals."""
    arrivals = {shape.name: shape.arrival_s for shape in shapes}
    programs = program_figures(0, records)
    assert {program.name for program in programs} == arrivals.keys()
    return summary([program.per_token_ms or 0.0 for program in programs], max(one.ended_us for one in records) / 1e6)


def waiting(seconds: Mapping[str, float], shapes: Sequence[ProgramShape]) -> float:
    """Mean over programs of the time per generated token, in ms, that is not the program's longest chain of tools.

    Args:
        seconds: by program, from its arrival to its last token.
    """
    tokens = {shape.name: sum(call.output for call in shape.calls) for shape in shapes}
    return statistics.fmean(1000 * (seconds[shape.name] - tool_chain_s(shape)) / tokens[shape.name] for shape in shapes)


def waiting_measured(records: Sequence[Any], shapes: Sequence[ProgramShape]) -> float:
    """`waiting` of what the engine did."""
    ends: dict[str, float] = {}
    for one in records:
        ends[one.program] = max(ends.get(one.program, 0.0), one.ended_us / 1e6)
    return waiting({shape.name: ends[shape.name] - shape.arrival_s for shape in shapes}, shapes)


def waiting_simulated(ended: Sequence[Ended], shapes: Sequence[ProgramShape]) -> float:
    return waiting({one.name: one.seconds for one in ended}, shapes)


def simulated(
    given: Mapping[str, Any], order: Order, shapes: Sequence[ProgramShape], step_tokens: int
) -> dict[str, float]:
    """The same figures as the simulator predicts them."""
    ended = run_simulator(given, order, shapes, step_tokens)
    return summary([one.per_token_s * 1000 for one in ended], max(one.ended_s for one in ended))


def run_simulator(
    given: Mapping[str, Any], order: Order, shapes: Sequence[ProgramShape], step_tokens: int
) -> list[Ended]:
    programs = [
        ProgramShape(shape.name, shape.arrival_s, in_blocks(shape.calls, given["block_size"])) for shape in shapes
    ]
    return simulate(
        order,
        programs,
        StepCost(**given["cost"]),
        given["slots"],
        given["quantum_ms"],
        step_tokens,
        told=not given["anonymous"],
    )


def summary(per_token_ms: Sequence[float], makespan_s: float) -> dict[str, float]:
    shares = quantiles(per_token_ms)
    return {"mean": statistics.fmean(per_token_ms), "p95": shares["p95"], "makespan s": makespan_s}


def in_child(given: Mapping[str, Any], task: str, number: int = 0) -> dict[str, Any]:
    """Runs a task, "calibration" or a policy, in a process of its own. Raises `ChildError` when it fails."""
    environment = serving_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    options = {"task": task, "number": number, "given": dict(given)}
    return dict(call(f"{__spec__.name}:work", options, environment))


def work(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task, in the child process; `options` are those of `in_child`."""
    task, given = options["task"], options["given"]
    return calibrate(given) if task == "calibration" else run_engine(given, task, options["number"])


HEAD = "| policy | round | figure | engine | simulator | simulator / engine |\n" + "|---" * 6 + "|"


def predicted(given: Mapping[str, Any], order: Order, number: int, step_tokens: int) -> dict[str, float]:
    """The figures of one policy in one round, from the simulator."""
    shapes = drawn(given, number)
    ended = run_simulator(given, order, shapes, step_tokens)
    return {WAITING: waiting_simulated(ended, shapes)} | simulated(given, order, shapes, step_tokens)


def beside(
    policy: str, number: int, engine: Mapping[str, float], model: Mapping[str, float], **more: Any
) -> dict[str, Any]:
    """Prints both sides, and returns them for the report, with `more` that is kept of the run."""
    ratios = {key: model[key] / engine[key] for key in FIGURES if key in engine}
    for key, ratio in ratios.items():
        print(f"| {policy} | {number + 1} | {key} | {engine[key]:.1f} | {model[key]:.1f} | {ratio:.2f} |")
    sys.stdout.flush()
    return {"policy": policy, "round": number, "engine": engine, "simulator": model, "ratio": ratios} | more


def compare(given: dict[str, Any], policies: Sequence[Order], rounds: int) -> list[dict[str, Any]]:
    """Runs everything; prints a line per policy and round as it is there, and returns them."""
    from vllm_agentserve.bench.records import Record

    print(HEAD)
    found = []
    for number in range(rounds):
        shapes = drawn(given, number)
        for policy in policies:
            run = in_child(given, policy, number)
            records = [Record(**one) for one in run["records"]]
            engine = {WAITING: waiting_measured(records, shapes)} | measured(records, shapes)
            model = predicted(given, policy, number, run["step_tokens"])
            kept = {"step_tokens": run["step_tokens"], "counts": run["counts"]}
            found.append(beside(policy, number, engine, model, **kept))
    return found


def compare_again(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs the simulator on the programs of an earlier report; the engine's figures are taken from there."""
    print(HEAD)
    found = []
    for run in report["runs"]:
        model = predicted(report["given"], run["policy"], run["round"], run["step_tokens"])
        kept = {"step_tokens": run["step_tokens"], "counts": run["counts"]}
        found.append(beside(run["policy"], run["round"], run["engine"], model, **kept))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_agentserve.simulator.agreement", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--workload", choices=list(PROGRAM_WORKLOADS), default="programs")
    parser.add_argument("--programs", type=int, default=48)
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--scale", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["fcfs", "plas", "atlas"])
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--quantum-ms", type=float, default=100.0, help="of plas and atlas; scaled programs are short")
    parser.add_argument("--model", help="model folder or name (default: the toy model)")
    parser.add_argument("--anonymous", action="store_true", help="send neither session ids nor hints")
    parser.add_argument("--cost", type=Path, help="file with the step's cost: read where it exists, else written")
    parser.add_argument("--output", type=Path, help="where everything goes, as JSON")
    parser.add_argument(
        "--recorded",
        type=Path,
        help="a file that --output wrote: its programs, cost and figures of the engine are taken, and only the simulator runs",
    )
    arguments = parser.parse_args()
    if arguments.recorded is not None:
        given_too = [
            f"--{name.replace('_', '-')}"
            for name, value in vars(arguments).items()
            if name not in ("recorded", "output") and value != parser.get_default(name)
        ]
        if given_too:
            parser.error(f"--recorded takes everything from that file: leave {', '.join(given_too)} out")
        try:
            report = json.loads(arguments.recorded.read_text())
            found = compare_again(report)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--recorded {arguments.recorded} is no file that --output wrote: {error!r}")
        write_report(arguments.output, report["given"], report.get("calibration", {}), found)
        return 0
    given = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("cost", "output", "policies", "rounds", "recorded")
    }
    calibration: dict[str, Any] = {}
    if arguments.cost is not None and arguments.cost.exists():
        cost = read_cost(arguments.cost)
    else:
        calibration = in_child(given, "calibration")
        cost = StepCost(**calibration["cost"])
        print("fit:", json.dumps({key: round(value, 3) for key, value in calibration["misfit"].items()}))
    if arguments.cost is not None and calibration:
        write_cost(arguments.cost, cost)
    given["cost"] = asdict(cost)
    print("cost:", json.dumps({key: round(value, 3) for key, value in given["cost"].items()}), flush=True)
    policies = [order for order in get_args(Order) if order in arguments.policies]
    found = compare(given, policies, arguments.rounds)
    write_report(arguments.output, given, calibration, found)
    return 0


def write_report(
    path: Path | None, given: Mapping[str, Any], calibration: Mapping[str, Any], found: Sequence[Mapping[str, Any]]
) -> None:
    """Writes everything as JSON, where a file is asked for."""
    if path is None:
        return
    report = {
        "command": " ".join(["python", "-m", __spec__.name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "vllm": installed_vllm(),
        "given": given,
        "calibration": calibration,
        "runs": found,
    }
    path.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    sys.exit(main())
