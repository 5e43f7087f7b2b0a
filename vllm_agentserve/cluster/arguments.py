"""The command line of `agentserve cluster`. It imports neither Ray nor vLLM."""

import argparse

from vllm_agentserve.bench.arguments import add_start_timeout, number_from, port_argument

POLICIES = ("conserve", "autellix", "sticky", "hash", "least-loaded", "round-robin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    serve = actions.add_parser(
        "serve",
        help="several engines behind one address, until Ctrl-C",
        usage="agentserve cluster serve [options] MODEL [options of vllm serve]",
        allow_abbrev=False,
    )
    serve.add_argument("--engines", type=number_from(1, 1024), default=2, metavar="N", help="default: %(default)s")
    serve.add_argument(
        "--ingresses",
        type=number_from(1, 1024),
        default=1,
        metavar="N",
        help="processes that take requests (default: %(default)s)",
    )
    serve.add_argument(
        "--prefillers",
        type=number_from(0, 1024),
        default=0,
        metavar="N",
        help="further engines that compute the first prompts of conversations (default: none)",
    )
    serve.add_argument(
        "--prefill-tokens",
        type=number_from(0, 1 << 30),
        default=4096,
        metavar="N",
        help="first prompts that are shorter are computed where their conversation lives (default: %(default)s)",
    )
    serve.add_argument(
        "--prefill-seconds",
        type=number_from(0.001, 1_000_000, whole=False),
        default=30.0,
        metavar="S",
        help="a prefiller that has not answered by then is not waited for (default: %(default)s)",
    )
    serve.add_argument("--policy", choices=POLICIES, default="conserve", help="default: %(default)s")
    serve.add_argument(
        "--bound",
        type=number_from(1, 1000, whole=False),
        default=1.25,
        metavar="X",
        help="an engine may have so many times its share before new conversations go elsewhere (default: %(default)s)",
    )
    serve.add_argument(
        "--pin-seconds",
        type=number_from(1, 1_000_000, whole=False),
        default=3600.0,
        metavar="S",
        help="a conversation that has done nothing for so long is forgotten (default: %(default)s)",
    )
    add_start_timeout(serve, "an engine", 1800.0)
    serve.add_argument("--host", default="127.0.0.1", help="where it listens (default: %(default)s)")
    serve.add_argument("--port", type=port_argument, default=8000, help="default: %(default)s")
    serve.add_argument(
        "--address", metavar="HOST:PORT", help="a Ray cluster that runs already (default: one made here)"
    )
    serve.add_argument("model", metavar="MODEL", help="a folder or a name, as for vllm serve")
    serve.add_argument("options", nargs=argparse.REMAINDER, help="given to every engine's vllm serve")
