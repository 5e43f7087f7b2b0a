"""What `agentserve bench` does: run, workloads, report."""

import argparse
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from rich.console import Console

from vllm_agentserve.bench.arms import last_value, parse_arms, split_options
from vllm_agentserve.bench.arrivals import Arrivals
from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.judge import PRIMARY, PRIMARY_OF_PROGRAMS, check_primary
from vllm_agentserve.bench.kv_pool import ANY_POOL, AnyPool, KvPool, kv_bytes, pool_of
from vllm_agentserve.bench.plan import Cell, Plan
from vllm_agentserve.bench.program_traffic import (
    LONGEST_NUMBER,
    PROGRAM_WORKLOADS,
    Traffic,
    program_serve_options,
    program_traffic,
)
from vllm_agentserve.bench.records import Results
from vllm_agentserve.bench.report import write_report
from vllm_agentserve.bench.run import new_folder, print_cells, run_plan, show
from vllm_agentserve.bench.sessions import Session, WorkloadError
from vllm_agentserve.bench.tokens import TOKEN_IDS
from vllm_agentserve.bench.trace import Trace, TraceOptions, trace_path
from vllm_agentserve.bench.workloads import WORKLOADS, Workload, around, explain, find_workload
from vllm_agentserve.options import read_json
from vllm_agentserve.pages import given_key

DEFAULT_ARMS = ("stock", "agentserve")
CPU_SERVE = ("--dtype", "bfloat16", "--max-num-seqs", "32", "--enforce-eager")
ONLY_OF_PROGRAMS = ("programs", "step_cost")
NOT_OF_PROGRAMS = ("agents", "sessions", "turns", "shared", "gap_s", "sessions_per_s")
NOT_OF_TRACES = ("agents", "sessions", "turns", "shared", "load", "sessions_per_s")
ONLY_OF_TRACES = {"pace": "closed", "trace_inputs": "auto", "block_tokens": None, "speed": 1.0}
ONLY_OF_TRACES |= {"limit": None, "time_unit": None}
"""By option: its default, with which it is taken for not given."""
TRACE_WORDS = """[bold]--trace FILE[/bold]
  Recorded traffic in the form of Mooncake, Dynamo's agentic rows, Bailian, Azure or Weka; `--trace sample` ships with us.

Lengths in tokens, times in seconds. --agents, --sessions, --turns, --shared and --scale change them; --scale is a factor on \
all lengths. Programs have --programs, --load and --step-cost instead of the first four. With --load or --sessions-per-s \
sessions of agents arrive at random."""


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
            analysis = write_report(Results(arguments.folder), arguments.clean, arguments.baseline)
        except WorkloadError as error:
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            return 2
        show(analysis, arguments.folder, console)
        return 0
    if arguments.bench == "table":
        return print_cells(arguments.folders, console)
    try:
        plan = make_plan(arguments, console)
    except WorkloadError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return run_plan(plan, arguments.output or new_folder(str(plan.cells[0].workload["name"])), console)


def make_plan(arguments: argparse.Namespace, console: Console) -> Plan:
    """Checks everything that can be checked before a server is started; raises `WorkloadError`."""
    try:
        key = given_key(arguments.api_key)
    except ValueError as error:
        raise WorkloadError(str(error)) from error
    chosen = DEFAULT_ARMS if arguments.arms is None and not arguments.url else arguments.arms or ()
    arms = parse_arms(chosen, arguments.url, key)
    model = arguments.model
    ours = any(arm.ours for arm in arms)
    if ours and model is None:
        from vllm_agentserve.toy import make_toy_model

        console.print("The model is a toy with random weights: its answers mean nothing, its timing does.")
        model = str(make_toy_model())
    serve = serve_options(arguments)
    cells = traffic_cells(arguments, serve, console)
    kv_pool: KvPool | AnyPool = ANY_POOL
    salt = ""
    if not all(arm.ours for arm in arms):
        salt = secrets.token_hex(4)
        console.print(
            "Servers at --url keep their prefix cache. This experiment has token ids of its own, which are not found there; "
            "but what else the caches hold, and what the servers have learned, is part of the result.",
            soft_wrap=True,
        )
    if arguments.kv_tokens is not None:
        if arguments.kv_gib is not None:
            raise WorkloadError("--kv-gib and --kv-tokens both say how large the KV cache is: leave one out")
        kv_pool = pool_of(arguments.kv_tokens, serve, has_nvidia_driver())
    plan = Plan(
        arms=arms,
        cells=cells,
        model=model,
        serve=serve,
        kv_bytes=kv_bytes(arguments.kv_gib, has_nvidia_driver()),
        kv_pool=kv_pool,
        port=arguments.port,
        start_timeout_s=arguments.start_timeout,
        rounds=arguments.rounds,
        seed=arguments.seed,
        answers=arguments.answers,
        slo_factor=arguments.slo_factor,
        anonymous=arguments.anonymous,
        salt=salt,
        primary=check_primary(arguments.primary or (PRIMARY_OF_PROGRAMS if programs_wanted(arguments) else PRIMARY)),
        command=("agentserve", *sys.argv[1:]),
    )
    if ours:
        check_model(str(model), plan)
        check_room(plan)
        kv_pool.check(plan.context_tokens)
    return plan


def base_options(toy: bool) -> tuple[str, ...]:
    """Options of vllm serve for all arms: for the toy model on a CPU those it runs best with, otherwise vLLM's defaults."""
    return CPU_SERVE if toy and not has_nvidia_driver() else ()


def serve_options(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Options of vllm serve for all arms. Of an option that is given twice vLLM takes the last one: the user's own is last.

    Workloads of programs bring defaults of their own.
    """
    programs = programs_wanted(arguments)
    own = program_serve_options(has_nvidia_driver(), PROGRAM_WORKLOADS[arguments.workload]) if programs else ()
    return (*base_options(arguments.model is None), *own, *split_options(arguments.serve))


def programs_wanted(arguments: argparse.Namespace) -> bool:
    return arguments.trace is None and arguments.workload in PROGRAM_WORKLOADS


def scale_of(workload: Workload) -> float:
    return 1.0 if has_nvidia_driver() else workload.cpu_scale


def traffic_cells(arguments: argparse.Namespace, serve: Sequence[str], console: Console) -> list[Cell]:
    """The traffic: one cell, or one for every value of `--gap-s`."""
    gaps = arguments.gap_s or [None]
    if arguments.gap_s is not None and arguments.trace is not None:
        raise WorkloadError("--gap-s means nothing to a trace, which says how long tools take: leave it out")
    if len(set(gaps)) < len(gaps):
        raise WorkloadError("--gap-s names a value twice: every gap is measured once")
    names = ["" if len(gaps) == 1 else f"gap-{gap:g}s" for gap in gaps]
    if len(set(names)) < len(names):
        raise WorkloadError(
            f"--gap-s {' '.join(map(str, gaps))}: two of these are the same to six digits: leave one out"
        )
    arrivals = arrivals_of(arguments)
    return [
        Cell(name, *traffic(arguments, serve, console, gap), arrivals) for name, gap in zip(names, gaps, strict=True)
    ]


def arrivals_of(arguments: argparse.Namespace) -> Arrivals | None:
    """How fast sessions arrive; None where agents begin together, and for programs and traces, which have a pace of their own."""
    if arguments.load is not None and arguments.sessions_per_s is not None:
        raise WorkloadError("--load and --sessions-per-s both say how fast sessions arrive: leave one out")
    if programs_wanted(arguments) or (arguments.load is None and arguments.sessions_per_s is None):
        return None
    return Arrivals(arguments.seed, arguments.sessions_per_s, arguments.load)


def traffic(
    arguments: argparse.Namespace, serve: Sequence[str], console: Console, gap_s: float | None = None
) -> Traffic:
    """The sessions of every round, and their description; each round has a seed of its own, the same for all arms.

    Args:
        gap_s: mean time a tool takes; None is the workload's own.
    """
    programs = programs_wanted(arguments)
    refuse(arguments, NOT_OF_PROGRAMS if programs else ONLY_OF_PROGRAMS)
    if arguments.trace is not None:
        refuse(arguments, NOT_OF_TRACES)
    else:
        refuse(arguments, [name for name, default in ONLY_OF_TRACES.items() if getattr(arguments, name) != default])
    if programs:
        return program_traffic(arguments, serve, has_nvidia_driver())
    return trace_traffic(arguments, console) if arguments.trace is not None else agent_traffic(arguments, gap_s)


def trace_traffic(arguments: argparse.Namespace, console: Console) -> Traffic:
    """The sessions of a recorded trace; raises `WorkloadError` where it cannot be read."""
    path, scale = trace_path(arguments.trace), arguments.scale or 1.0
    options = TraceOptions(
        arguments.pace,
        arguments.trace_inputs,
        arguments.block_tokens,
        scale,
        arguments.speed,
        arguments.limit,
        arguments.time_unit,
    )
    console.print(f"Reading the trace {path.name} ...", markup=False, soft_wrap=True)
    trace = Trace(path, options)
    for words in trace.summary():
        console.print(words, markup=False, highlight=False, soft_wrap=True)

    @cache
    def replayed(number: int) -> list[Session]:
        return trace.sessions(arguments.seed * 1000 + number)

    return replayed, {"name": f"trace {path.name}", "scale": f"{scale:g}", "pace": options.pace}


def agent_traffic(arguments: argparse.Namespace, gap_s: float | None) -> Traffic:
    """Sessions drawn from the distributions of a workload."""
    workload = find_workload(arguments.workload, PROGRAM_WORKLOADS)
    if gap_s is not None:
        workload = replace(workload, tool_s=around(gap_s))
    scale = arguments.scale or scale_of(workload)
    chosen = WorkloadOptions(arguments.agents, arguments.sessions, arguments.turns, arguments.shared, scale)

    @cache
    def drawn(number: int) -> list[Session]:
        return draw_sessions(workload, chosen, arguments.seed * 1000 + number)

    described = {"name": workload.name, "scale": f"{scale:g}", "agents": chosen.agents or workload.agents}
    given = {"sessions": chosen.sessions, "turns": chosen.turns}
    described |= {key: value for key, value in given.items() if value is not None}
    factors = {"gap_s": gap_s, "shared": chosen.shared}
    described |= {key: f"{value:g}" for key, value in factors.items() if value is not None}
    return drawn, described | {"summary": workload.summary, "source": workload.source}


def refuse(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises `WorkloadError` for options that the workload would ignore."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None:
            what = f"workload {arguments.workload!r}" if arguments.trace is None else "a trace"
            if name in ONLY_OF_PROGRAMS:
                instead = f"choose one of {', '.join(PROGRAM_WORKLOADS)}"
            elif name in ONLY_OF_TRACES:
                instead = "give a --trace"
            else:
                instead = "choose lines of it with --limit"
                if arguments.trace is None:
                    instead = "use --load" if name == "sessions_per_s" else "use --programs"
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
    try:
        config = read_json((folder / "config.json").read_text())
    except ValueError as error:
        raise WorkloadError(
            f"--model {model}: its config.json is not JSON ({error}): name a folder with a whole model"
        ) from error
    if not isinstance(config, dict):
        raise WorkloadError(f"--model {model}: its config.json is no JSON object: name a folder with a whole model")
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    workload = plan.cells[0].workload
    # What is no number is for vLLM to judge.
    room, vocabulary = (
        value if isinstance(value := config.get(name), int) else None
        for name in ("max_position_embeddings", "vocab_size")
    )
    if room is not None and plan.context_tokens > room:
        raise WorkloadError(
            f"workload {workload['name']!r} at scale {workload['scale']} needs {plan.context_tokens} tokens of "
            f"context, the model has {room}: use --scale {fitting_scale(plan, room):.2g} or less"
        )
    if vocabulary is not None and vocabulary < TOKEN_IDS[1]:
        raise WorkloadError(
            f"--model {model} has {vocabulary} tokens; prompts are drawn from the first {TOKEN_IDS[1]}: use a model with more"
        )


def check_room(plan: Plan) -> None:
    """Compares what the workload needs with `--max-model-len`, where it is given as a plain number."""
    for arm in plan.arms:
        if not arm.ours:
            continue
        given = last_value((*plan.serve, *arm.options), "--max-model-len") or ""
        if given.isdecimal() and len(given) <= LONGEST_NUMBER and int(given) < plan.context_tokens:
            raise WorkloadError(
                f"arm {arm.name!r} has --max-model-len {given}, the workload needs {plan.context_tokens}: use a smaller "
                "--scale, or give more"
            )


def fitting_scale(plan: Plan, room: int) -> float:
    """A scale at which the longest context fits into `room` tokens, with a little to spare for rounding."""
    return float(plan.cells[0].workload["scale"]) * room / plan.context_tokens * 0.95
