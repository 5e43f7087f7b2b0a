"""The command `agentserve`: doctor, top, bench, demo, cluster, gpu-check, toy-model."""

import argparse
import errno
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_agentserve import __version__
from vllm_agentserve.bench.arguments import add_arguments as add_bench_arguments
from vllm_agentserve.bench.arguments import add_start_timeout, number_from, port_argument
from vllm_agentserve.cluster.arguments import add_arguments as add_cluster_arguments
from vllm_agentserve.config import KEY, AgentServeConfig, OptionError
from vllm_agentserve.extras import MissingExtraError, remedy_for, require
from vllm_agentserve.options import read_json
from vllm_agentserve.shapes import SHAPES
from vllm_agentserve.vllm_compat import UnsupportedVllmError

INTERRUPTED = 130
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
UNWRITABLE |= {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""A disk that is full, a quota or limit that is reached, a place that is not ours; a place that cannot be a folder."""


def options_argument(text: str) -> dict[str, Any]:
    """Parses and checks `--options`; the message of a wrong one names the option, the value and what is allowed."""
    try:
        given = read_json(text)
        AgentServeConfig.from_mapping(given)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}); example: '{{\"tpot_slo_ms\": 40}}'"
        ) from error
    return dict(given)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agentserve", description="Agent-aware scheduling for stock vLLM.")
    parser.add_argument("--version", action="version", version=f"agentserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="what will run on this machine and why, with a remedy per finding")
    doctor.add_argument("--options", default="{}", help=f'options of "{KEY}" to check, as a JSON object')
    doctor.add_argument("--model", help="a model folder; its weights say what lanes would cost")
    doctor.add_argument(
        "--engine", default="{}", help="arguments of vllm serve that lanes must fit, as a JSON object with underscores"
    )

    top = commands.add_parser("top", help="the programs of a running server, live")
    top.add_argument("--url", default="http://127.0.0.1:8000", help="its address (default: %(default)s)")
    top.add_argument(
        "--interval",
        type=number_from(0.1, 3600, whole=False),
        default=1.0,
        metavar="S",
        help="seconds between two refreshes (default: %(default)s)",
    )
    top.add_argument("--session", metavar="ID", help="the session id whose program is marked")
    top.add_argument("--api-key", metavar="KEY", help="if the server wants one (default: OPENAI_API_KEY, if it is set)")
    top.add_argument("--once", action="store_true", help="print one table and end; so does output to a file or a pipe")

    bench = commands.add_parser("bench", help="measure stock vLLM, agentserve and other servers on agent traffic")
    add_bench_arguments(bench)

    demo = commands.add_parser(
        "demo", help="stock vLLM against vLLM with our flag, on the same agents, in a few minutes"
    )
    demo.add_argument("--model", help="a model folder or name (default: a toy model made here)")
    demo.add_argument("--agents", type=number_from(1, 64), default=5, help="agents at work (default: %(default)s)")
    demo.add_argument("--turns", type=number_from(1, 64), default=6, help="turns of each agent (default: %(default)s)")
    demo.add_argument("--port", type=port_argument, help="where the servers listen (default: a free port)")
    add_start_timeout(demo, "a server", 300.0)
    demo.add_argument("--options", type=options_argument, default={}, help=f'options of "{KEY}", as a JSON object')

    cluster = commands.add_parser("cluster", help="several engines behind one address, on Ray Serve")
    add_cluster_arguments(cluster)

    # It parses its own arguments, see `main`.
    commands.add_parser(
        GPU_CHECK, add_help=False, help="check what of this package works on this machine's GPU, in ten minutes"
    )

    toy = commands.add_parser("toy-model", help="make the toy model and print its folder")
    toy.add_argument("--output", type=Path, help="where (default: the user's cache)")
    toy.add_argument(
        "--shape",
        choices=[shape.name for shape in SHAPES],
        help="a folder below it with a model of this size instead, without weights: serve it with --load-format dummy",
    )
    toy.add_argument(
        "--weights", action="store_true", help="with --shape: random weights too, for servers that make none themselves"
    )
    return parser


def demo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from vllm_agentserve.bench.demo import demo_plan, run_demo
    from vllm_agentserve.bench.sessions import WorkloadError
    from vllm_agentserve.toy import make_toy_model
    from vllm_agentserve.vllm_compat import require_supported_vllm

    console = Console()
    require_supported_vllm()
    toy = arguments.model is None
    if toy:
        console.print("Making the toy model (random weights: the answers mean nothing, the timing does) ...")
    model = str(make_toy_model() if toy else arguments.model)
    try:
        plan = demo_plan(
            model,
            toy,
            arguments.agents,
            arguments.turns,
            arguments.port,
            arguments.options,
            arguments.start_timeout,
        )
    except WorkloadError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return run_demo(plan, console)


def bench(arguments: argparse.Namespace) -> int:
    from vllm_agentserve.bench.command import execute

    return execute(arguments)


def cluster(arguments: argparse.Namespace) -> int:
    from vllm_agentserve.cluster.command import execute

    return execute(arguments)


def top(arguments: argparse.Namespace) -> int:
    from vllm_agentserve.top import execute

    return execute(arguments)


def doctor(arguments: argparse.Namespace) -> int:
    from vllm_agentserve.doctor import examine, print_findings

    return print_findings(examine(arguments.options, arguments.model, arguments.engine), arguments.options)


def toy_model(arguments: argparse.Namespace) -> int:
    from vllm_agentserve.shapes import make_shaped_model
    from vllm_agentserve.toy import make_toy_model

    if (folder := arguments.output) is not None:
        # Before the model is made, which takes seconds.
        for place in (folder, *folder.parents):
            if place.exists() and not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "this is a file, not a folder", str(place))
    if arguments.shape:
        print(make_shaped_model(arguments.shape, arguments.output, arguments.weights))
    else:
        print(make_toy_model(arguments.output))
    return 0


def gpu_check(arguments: argparse.Namespace) -> int:
    from vllm_agentserve.gpucheck.command import main as check

    return check(arguments.rest)


@dataclass(frozen=True)
class Command:
    """A sub-command: what it does with its arguments, and the extra that brings what it needs beyond vLLM; "" for none."""

    run: Callable[[argparse.Namespace], int]
    extra: str = ""


GPU_CHECK = "gpu-check"
COMMANDS = {
    "doctor": Command(doctor),
    "top": Command(top, "cli"),
    "bench": Command(bench, "bench"),
    "demo": Command(demo, "bench"),
    "cluster": Command(cluster, "cluster"),
    GPU_CHECK: Command(gpu_check),
    "toy-model": Command(toy_model),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [GPU_CHECK]:
        # Its parser is not loaded before it is wanted.
        arguments = argparse.Namespace(command=GPU_CHECK, rest=argv[1:])
    else:
        arguments = make_parser().parse_args(argv)
    # A plain `kill` unwinds like Ctrl-C, so that no server is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = COMMANDS[arguments.command]
    try:
        require(arguments.command, command.extra)
        return command.run(arguments)
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        remedy = remedy_for(error.name, command.extra)
        if remedy is None:
            raise
        print(f"error: agentserve {arguments.command} needs {error.name}{remedy}", file=sys.stderr)
        return 2
    except UnsupportedVllmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(
            f"error: {error.filename or 'a file'}: {error.strerror}. What was measured until then is kept; make room there, or "
            "name another place.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nstopped; no server is left running", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
