"""A process in the place of the lane's own, without vLLM: `ProcessLane` with it starts in a tenth of a second.

python stub_lane.py HOW... DESCRIPTOR PARENT   # see `main`
"""

import os
import socket
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_agentserve.lanes.cpu.channel import Channel
from vllm_agentserve.policy.jobs import Job

HERE = Path(__file__).resolve()


def main() -> None:
    """`HOW` says what it does: `ready` once it has its setup (`late` a second later, `never`), then `serve` (answers every job),
    `hold` (answers none), `deaf` (does not even read), `exit` at its first job, `fail` it, or `linger` (closes the connection and
    does not end)."""
    start, then = sys.argv[1:3]
    # The setup's own module imports torch, which takes ten times as long as everything else here.
    module: Any = ModuleType("vllm_agentserve.lanes.cpu.runner")
    module.Setup = type("Setup", (), {})
    sys.modules[module.__name__] = module
    channel = Channel(socket.socket(fileno=int(sys.argv[3])))
    messages = channel.receive(None)[1:]
    if start == "never":
        time.sleep(600)
    if start == "late":
        time.sleep(1.0)
    channel.send(("ready", None, 0.01))
    if then == "deaf":
        time.sleep(600)
    while True:
        messages += channel.receive(None) if not messages else []
        kind, value = messages.pop(0)
        if then == "serve":
            channel.send(("done", value if kind == "cancel" else value.request_id, None))
        elif then == "exit":
            os._exit(3)
        elif then == "fail":
            channel.send(("failed", value.request_id, "no"))
            time.sleep(600)
        elif then == "linger":
            channel.close()
            time.sleep(600)


def job(name: str, tokens: int = 10) -> Job:
    return Job(name, list(range(100_000, 100_001 + tokens)), (list(range(tokens // 16 + 1)),), 0)


class Cores:
    """In the place of `lanes.cpu.cores.Cores`."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def take(self, cores: list[int]) -> None:
        self.taken = cores


def stub_lane(start: str = "ready", then: str = "serve", **given: Any) -> Any:
    """A `ProcessLane` of two cores around such a process."""
    from vllm_agentserve.lanes.cpu.process import ProcessLane
    from vllm_agentserve.lanes.cpu.runner import Setup
    from vllm_agentserve.policy.step_sizes import KernelSizes

    setup = Setup(None, None, (0, 0), 256, 256, ([1],), [0, 1], [1])
    given = {"cores": Cores(), "kernels": KernelSizes(), "command": (sys.executable, str(HERE), start, then)} | given
    return ProcessLane(setup, **given)


if __name__ == "__main__":
    main()
