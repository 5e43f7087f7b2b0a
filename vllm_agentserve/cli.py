"""The command `agentserve`: demo, doctor, toy-model."""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from vllm_agentserve import __version__
from vllm_agentserve.config import KEY, AgentServeConfig, OptionError

INTERRUPTED = 130


def options_argument(text: str) -> dict[str, Any]:
    """Parses and checks `--options`; the message of a wrong one names the option, the value and what is allowed."""
    try:
        given = json.loads(text)
        AgentServeConfig.from_mapping(given)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}); example: '{{\"tpot_slo_ms\": 40}}'"
        ) from error
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return dict(given)


def port_argument(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 1 to 65535")
    return int(text)


def count_argument(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 to 64")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agentserve", description="Agent-aware scheduling for stock vLLM.")
    parser.add_argument("--version", action="version", version=f"agentserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="stock vLLM against vLLM with our flag, on the same agents, in a few minutes"
    )
    demo.add_argument("--model", type=Path, help="a model folder (default: a toy model made here)")
    demo.add_argument("--agents", type=count_argument, default=5, help="agents at work (default: %(default)s)")
    demo.add_argument("--turns", type=count_argument, default=6, help="turns of each agent (default: %(default)s)")
    demo.add_argument("--port", type=port_argument, help="where the servers listen (default: a free port)")
    demo.add_argument("--options", type=options_argument, default={}, help=f'options of "{KEY}", as a JSON object')

    doctor = commands.add_parser("doctor", help="what will run on this machine and why, with a remedy per finding")
    doctor.add_argument("--options", default="{}", help=f'options of "{KEY}" to check, as a JSON object')

    toy = commands.add_parser("toy-model", help="make the toy model and print its folder")
    toy.add_argument("--output", type=Path, help="where (default: the user's cache)")
    return parser


def demo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from vllm_agentserve.bench.client import StreamError
    from vllm_agentserve.bench.demo import run_demo
    from vllm_agentserve.bench.server import ServerError
    from vllm_agentserve.toy import make_toy_model
    from vllm_agentserve.vllm_compat import UnsupportedVllmError, require_supported_vllm

    console = Console()
    try:
        require_supported_vllm()
        if arguments.model is not None and not (arguments.model / "config.json").exists():
            console.print(f"error: --model {arguments.model} holds no config.json: name a model folder", style="red")
            return 2
        if arguments.model is None:
            console.print("Making the toy model (random weights: the answers mean nothing, the timing does) ...")
        model = arguments.model or make_toy_model()
        run_demo(model, arguments.agents, arguments.turns, arguments.port, arguments.options, console)
    except ExceptionGroup as group:
        console.print(f"error: {group.exceptions[0]}", style="red", markup=False)
        return 1
    except (ServerError, StreamError, UnsupportedVllmError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from vllm_agentserve.doctor import examine, print_findings

    return print_findings(examine(arguments.options))


def toy_model(arguments: argparse.Namespace) -> int:
    from vllm_agentserve.toy import make_toy_model

    print(make_toy_model(arguments.output))
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    # A plain `kill` unwinds like Ctrl-C, so that no server is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return {"demo": demo, "doctor": doctor, "toy-model": toy_model}[arguments.command](arguments)
    except KeyboardInterrupt:
        print("\nstopped; no server is left running", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
