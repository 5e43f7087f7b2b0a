"""A cluster of engines as a process of its own, for the benchmark of several engines and for their tests."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_S = 300.0
"""What a cluster gets to start."""
END_S = 90.0
"""What it gets to end by itself."""


@dataclass(frozen=True)
class ClusterProcess:
    """Args:
    port: where it listens, on 127.0.0.1.
    log: what it and its engines say.
    pid: of the command.
    """

    port: int
    log: Path
    pid: int

    def engines(self) -> dict[str, int]:
        """The process of each engine's `vllm serve` that lives, by the engine's name."""
        ready = re.findall(r"agentserve: engine (\S+) is ready, process (\d+)", self.log.read_text(errors="replace"))
        return {name: int(pid) for name, pid in ready if Path(f"/proc/{pid}").exists()}


def descendants(pid: int) -> set[int]:
    """A process and all that it started and that lives."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = set[int](), [pid]
    while todo:
        found.add(one := todo.pop())
        todo += children.get(one, [])
    return found


def in_session(leader: int) -> set[int]:
    """The processes of a session that live: what a leader which has died left behind is nobody's child."""
    found = set[int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[3]) == leader:
                found.add(int(stat.parent.name))
    return found


@contextlib.contextmanager
def cluster_process(
    model: Path, port: int, log: Path, own: Sequence[str], options: Sequence[str], environment: Mapping[str, str]
) -> Iterator[ClusterProcess]:
    """Starts `agentserve cluster serve`, and ends it with all that it started.

    Args:
        own: options of the cluster.
        options: of `vllm serve`.

    Raises:
        RuntimeError: it did not start within `START_S`; the message has the end of its log.
    """
    command = [sys.executable, "-m", "vllm_agentserve.cli", "cluster", "serve", *own, "--port", str(port), str(model)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    known = {process.pid}
    try:
        deadline = time.monotonic() + START_S
        while f"at http://127.0.0.1:{port}" not in (said := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the cluster did not start; its log {log} ends with:\n{said[-8000:]}")
            time.sleep(0.5)
        yield ClusterProcess(port, log, process.pid)
    finally:
        known |= descendants(process.pid) | in_session(process.pid)
        # Not SIGINT: what a script starts in the background ignores it.
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        for pid in known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
