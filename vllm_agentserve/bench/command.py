"""What `agentserve bench` does: run, workloads, report."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_agentserve.bench.arms import parse_arms, split_options
from vllm_agentserve.bench.experiment import Experiment, Plan
from vllm_agentserve.bench.program_traffic import PROGRAM_WORKLOADS, Traffic, program_options, program_traffic
from vllm_agentserve.bench.progress import Progress
from vllm_agentserve.bench.records import Results
from vllm_agentserve.bench.report import PAGE, TABLE, describe_workload, rows, write_report
from vllm_agentserve.bench.server import has_nvidia_driver
from vllm_agentserve.bench.sessions import TOKEN_IDS, Session, WorkloadError
from vllm_agentserve.bench.summary import Findings
from vllm_agentserve.bench.trace import Reading, read_trace, trace_path
from vllm_agentserve.bench.workloads import WORKLOADS, Shape, Workload, draw_sessions, explain, find_workload

DEFAULT_ARMS = ("stock", "agentserve")
CPU_SERVE = ("--dtype", "bfloat16", "--max-num-seqs", "32", "--enforce-eager")
CPU_KV_GIB = 2.0
ONLY_OF_PROGRAMS = ("programs", "load", "step_cost")
NOT_OF_PROGRAMS = ("agents", "sessions", "turns", "shared")
TRACE_WORDS = """[bold]--trace FILE[/bold]
  Recorded traffic in the Mooncake project's JSONL form, as aiperf reads and writes it; `--trace sample` ships with us.

Lengths in tokens, times in seconds. --agents, --sessions, --turns, --shared and --scale change them; --scale is a factor on \
all lengths. Programs have --programs, --load and --step-cost instead of the first four."""


def execute(arguments: argparse.Namespace) -> int:
    console = Console()
    if arguments.bench == "workloads":
        explained = {name: explain(workload) for name, workload in WORKLOADS.items()}
        explained |= {name: workload.explain() for name, workload in PROGRAM_WORKLOADS.items()}
        for name, lines in explained.items():
            console.print(f"[bold]{name}[/bold]", *lines, sep="\n  ", highlight=False, soft_wrap=True)
        console.print(TRACE_WORDS, highlight=False, soft_wrap=True)
        return 0
    if arguments.bench == "report":
        if not (arguments.folder / Results.EXPERIMENT).exists():
            console.print(
                f"error: {arguments.folder} holds no {Results.EXPERIMENT}: name a results folder", markup=False
            )
            return 2
        try:
            findings = write_report(Results(arguments.folder), arguments.clean, arguments.baseline)
        except WorkloadError as error:
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            return 2
        show(findings, arguments.folder, console)
        return 0
    try:
        plan = make_plan(arguments, console)
    except WorkloadError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return run_plan(plan, arguments.output or new_folder(str(plan.workload["name"])), console)


def make_plan(arguments: argparse.Namespace, console: Console) -> Plan:
    """Checks everything that can be checked before a server is started; raises `WorkloadError`."""
    arms = parse_arms(
        DEFAULT_ARMS if arguments.arms is None and not arguments.url else arguments.arms or (), arguments.url
    )
    model = arguments.model
    ours = any(arm.url is None for arm in arms)
    if ours and model is None:
        from vllm_agentserve.toy import make_toy_model

        console.print("The model is a toy with random weights: its answers mean nothing, its timing does.")
        model = str(make_toy_model())
    serve = serve_options(arguments)
    sessions, workload = traffic(arguments, serve)
    plan = Plan(
        arms=arms,
        sessions=sessions,
        workload=workload,
        model=model,
        serve=serve,
        kv_bytes=kv_bytes(arguments.kv_gib),
        port=arguments.port,
        rounds=arguments.rounds,
        seed=arguments.seed,
        answers=arguments.answers,
        slo_factor=arguments.slo_factor,
        anonymous=arguments.anonymous,
        command=("agentserve", *sys.argv[1:]),
    )
    if ours:
        check_model(str(model), plan)
    return plan


def base_options(toy: bool) -> tuple[str, ...]:
    """Options of vllm serve for all arms: for the toy model on a CPU those it runs best with, otherwise vLLM's defaults."""
    return CPU_SERVE if toy and not has_nvidia_driver() else ()


def serve_options(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Options of vllm serve for all arms. Of an option that is given twice vLLM takes the last one: the user's own is last.

    Workloads of programs bring defaults of their own.
    """
    programs = arguments.trace is None and arguments.workload in PROGRAM_WORKLOADS
    own = program_options(has_nvidia_driver()) if programs else ()
    return (*base_options(arguments.model is None), *own, *split_options(arguments.serve))


def kv_bytes(gib: float | None) -> int | None:
    """Size of the KV cache; None where a first start has to find it."""
    gib = gib if gib is not None or has_nvidia_driver() else CPU_KV_GIB
    return None if gib is None else int(gib * 2**30)


def scale_of(workload: Workload) -> float:
    return 1.0 if has_nvidia_driver() else workload.cpu_scale


def traffic(arguments: argparse.Namespace, serve: Sequence[str]) -> Traffic:
    """The sessions of every round, and their description; each round has a seed of its own, the same for all arms."""
    programs = arguments.trace is None and arguments.workload in PROGRAM_WORKLOADS
    refuse(arguments, NOT_OF_PROGRAMS if programs else ONLY_OF_PROGRAMS)
    if programs:
        return program_traffic(arguments, serve, has_nvidia_driver())
    if arguments.trace is not None:
        scale = arguments.scale or 1.0
        reading = Reading(
            arguments.pace, arguments.trace_inputs, arguments.block_tokens, scale, arguments.speed, arguments.limit
        )
        path = trace_path(arguments.trace)
        described: dict[str, Any] = {"name": f"trace {path.name}", "scale": f"{scale:g}", "pace": reading.pace}

        @cache
        def replayed(number: int) -> list[Session]:
            return read_trace(path, reading, arguments.seed * 1000 + number)

        replayed(0)
        return replayed, described
    workload = find_workload(arguments.workload, PROGRAM_WORKLOADS)
    scale = arguments.scale or scale_of(workload)
    shape = Shape(arguments.agents, arguments.sessions, arguments.turns, arguments.shared, scale)

    @cache
    def drawn(number: int) -> list[Session]:
        return draw_sessions(workload, shape, arguments.seed * 1000 + number)

    described = {"name": workload.name, "scale": f"{scale:g}", "agents": shape.agents or workload.agents}
    described |= {
        key: value for key, value in (("sessions", shape.sessions), ("turns", shape.turns)) if value is not None
    }
    if shape.shared is not None:
        described["shared"] = f"{shape.shared:g}"
    return drawn, described | {"summary": workload.summary, "source": workload.source}


def refuse(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises `WorkloadError` for options that the workload would ignore."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None:
            what = f"workload {arguments.workload!r}" if arguments.trace is None else "a trace"
            instead = f"choose one of {', '.join(PROGRAM_WORKLOADS)}" if name in ONLY_OF_PROGRAMS else "use --programs"
            raise WorkloadError(
                f"--{name.replace('_', '-')} {value} means nothing to {what}: leave it out, or {instead}"
            )


def check_model(model: str, plan: Plan) -> None:
    """Compares what the workload needs with the model's own limits, where its folder is here."""
    folder = Path(model)
    if not folder.exists():
        if model.startswith((".", "/", "~")):
            raise WorkloadError(f"--model {model} does not exist: name a model folder, or a model of the hub")
        return
    if not (folder / "config.json").exists():
        raise WorkloadError(f"--model {model} holds no config.json: name a model folder")
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    room, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
    if room is not None and plan.context_tokens > room:
        raise WorkloadError(
            f"workload {plan.workload['name']!r} at scale {plan.workload['scale']} needs {plan.context_tokens} tokens of "
            f"context, the model has {room}: use --scale {fitting_scale(plan, room):.2g} or less"
        )
    if vocabulary is not None and vocabulary < TOKEN_IDS[1]:
        raise WorkloadError(
            f"--model {model} has {vocabulary} tokens; prompts are drawn from the first {TOKEN_IDS[1]}: use a model with more"
        )


def fitting_scale(plan: Plan, room: int) -> float:
    """A scale at which the longest context fits into `room` tokens, with a little to spare for rounding."""
    return float(plan.workload["scale"]) * room / plan.context_tokens * 0.95


def run_plan(plan: Plan, folder: Path, console: Console, conclude: Callable[[Findings], str] = lambda _: "") -> int:
    """Runs an experiment and reports what was measured, also after an error or Ctrl-C; returns the exit code.

    Args:
        conclude: what to say under the table when everything was measured.
    """
    from vllm_agentserve.bench.endpoint import EndpointError
    from vllm_agentserve.bench.server import ServerError

    try:
        with Progress(console) as progress:
            experiment = Experiment(plan, folder, progress)
            experiment.run()
    except KeyboardInterrupt:
        console.print("\nStopped; no server is left running.")
        report_partial(folder, console)
        return 130
    except (ServerError, EndpointError, WorkloadError, FileExistsError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        if not isinstance(error, FileExistsError):
            report_partial(folder, console)
        return 1
    findings = write_report(Results(folder))
    show(findings, folder, console)
    if words := conclude(findings):
        console.print(words, soft_wrap=True)
    return 0


def report_partial(folder: Path, console: Console) -> None:
    results = Results(folder)
    if any(one.error is None for one in results.rounds()):
        show(write_report(results), folder, console)
    else:
        console.print(f"No run of any arm ended; what there is lies in {folder}.", markup=False)


def show(findings: Findings, folder: Path, console: Console) -> None:
    """Prints the table and where the rest is."""
    names = list(findings.figures)
    table = Table(title=describe_workload(findings.experiment).replace("`", ""), title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for metric, cells in rows(findings, intervals=False):
        table.add_row(f"{metric.label}{f' ({metric.unit})' if metric.unit else ''}", *cells)
    console.print(table)
    console.print(
        f"In brackets: ratio to {findings.baseline}; intervals are in the page and the table to paste.", markup=False
    )
    for note in findings.summary["notes"]:
        console.print(f"- {note}", markup=False, soft_wrap=True)
    console.print(f"Page: {folder / PAGE}   table to paste: {folder / TABLE}", markup=False, soft_wrap=True)


def new_folder(name: str) -> Path:
    """bench-results/NAME-1, or the next number that is free."""
    plain = "".join(c if c.isalnum() or c in "-._" else "-" for c in name)
    number = 1
    while (folder := Path("bench-results") / f"{plain}-{number}").exists():
        number += 1
    return folder
