"""`agentserve cluster serve`: a Ray of its own, or one that runs already, with one application on it."""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from importlib.util import find_spec

from vllm_agentserve.cluster.settings import ClusterSettings, SettingsError
from vllm_agentserve.vllm_compat import require_supported_vllm


def is_taken(host: str, port: int) -> bool:
    """Whether a server listens there already, or there is no such address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return True
    return False


def settings_of(arguments: argparse.Namespace) -> ClusterSettings:
    """The settings that a command line gives.

    Raises:
        SettingsError: one of them is not allowed.
    """
    return ClusterSettings(
        model=arguments.model,
        options=tuple(arguments.options),
        engines=arguments.engines,
        ingresses=arguments.ingresses,
        prefillers=arguments.prefillers,
        prefill_tokens=arguments.prefill_tokens,
        prefill_seconds=arguments.prefill_seconds,
        policy=arguments.policy,
        bound=arguments.bound,
        pin_seconds=arguments.pin_seconds,
        start_timeout_s=arguments.start_timeout,
    )


def execute(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted. Returns the exit code."""
    require_supported_vllm()
    try:
        settings = settings_of(arguments)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if settings.prefillers and find_spec("nixl") is None:
        print("error: --prefillers needs NIXL, which moves KV: pip install 'vllm-agentserve[nixl]'", file=sys.stderr)
        return 1
    if is_taken(arguments.host, arguments.port):
        print(f"error: port {arguments.port} is in use: choose another with --port, before the model", file=sys.stderr)
        return 1
    # Before Ray is imported, which reads them then.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would read a session from the header, and refuse the bytes that it cannot decode. The ingress reads it.
    os.environ.setdefault("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-agentserve-unused")
    # Ray would leave out lines of one engine that another one has written too.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if arguments.address is None:
        # Ray's own option for machines whose firewall asks: a Ray that no other machine can join listens on 127.0.0.1 only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if settings.prefillers:
            # Engines that all run here move KV without a network.
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
            os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
    import ray
    from ray import serve

    from vllm_agentserve.cluster.actor import TableActor
    from vllm_agentserve.cluster.application import NAME, build

    if arguments.address is None:
        ray.init(address="local", include_dashboard=False)
    else:
        ray.init(address=arguments.address)
    failure = ""
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": arguments.host, "port": arguments.port})
        began_s = time.monotonic()
        try:
            serve.run(build(settings.mapping()), name=NAME, route_prefix="/")
        except RuntimeError as error:
            reason = TableActor(NAME, settings).first_failure(time.monotonic() - began_s)
            failure = f"the engines did not start: {reason or error}"
            return 1
        print(f"{settings.engines} engines at http://{arguments.host}:{arguments.port}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Event().wait()
        return 0
    finally:
        try:
            if arguments.address is None:
                serve.shutdown()
            else:
                serve.delete(NAME)
            ray.shutdown()
        finally:
            # After all that Ray says while it ends.
            if failure:
                print(f"error: {failure}", file=sys.stderr, flush=True)
