"""A `vllm serve` of our own: started, waited for, stopped, and nothing left behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vllm_agentserve.bench.arms import last_value
from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.processes.group import stop_group

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
RANKS = (
    ("--data-parallel-size-local", "-dpl", "--data-parallel-size", "-dp"),
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
)
"""Options of `vllm serve` whose values, multiplied, are its processes on this machine; of a group the first that is given."""
ERROR_LINE = re.compile(
    r"^(?:\(.*?\)\s*)?(?:(?:ERROR|CRITICAL)\b|[\w. -]+: error: |Traceback \(most recent call last\))"
)
"""A line of a log with which an error begins; processes of vLLM write their names before it."""
RAISED = re.compile(
    r"^(?:\(.*?\)\s*)?(?:ERROR [^\]]*\] )?((?:[A-Za-z_][\w]*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b.*)"
)
"""The line of a traceback that says what was raised."""
FOLLOWING = ("EngineDeadError", "Engine core initialization failed", "KeyboardInterrupt", "CancelledError")
"""What is raised because something else has failed before."""


class ServerError(RuntimeError):
    """The server did not start or died; the message ends with the last lines of its log."""


def free_port() -> int:
    """A TCP port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serving_environment(
    base: Mapping[str, str] | None = None, offline: bool = True, options: Sequence[str] = ()
) -> dict[str, str]:
    """The environment for vLLM, by default without a model hub; without an NVIDIA driver, on all cores of the CPU.

    Args:
        options: of `vllm serve`, which say how many processes share the cores.
    """
    environment = dict(os.environ if base is None else base)
    if offline:
        environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not has_nvidia_driver():
        environment.setdefault("VLLM_TARGET_DEVICE", "cpu")
        # vLLM's own default leaves one core to the rest of the system, which on two cores is half of them.
        environment.setdefault(
            "VLLM_CPU_OMP_THREADS_BIND", bound_cores(sorted(os.sched_getaffinity(0)), ranks(options))
        )
    return environment


def ranks(options: Sequence[str]) -> int:
    """How many processes of one server compute on this machine."""
    product = 1
    for names in RANKS:
        given = next(filter(None, (last_value(options, name) for name in names)), "1")
        product *= int(given) if re.fullmatch(r"[1-9]\d{0,3}", given) else 1
    return product


def bound_cores(cores: Sequence[int], count: int) -> str:
    """The cores of every process as vLLM takes them, one list for each; with fewer cores than processes some share one."""
    share = max(len(cores) // count, 1)
    lists = [[cores[(rank * share + place) % len(cores)] for place in range(share)] for rank in range(count)]
    return "|".join(",".join(map(str, one)) for one in lists)


def first_cause(log: str) -> str:
    """What went wrong first, from the log of a server that did not start; "" where it names nothing.

    A server ends in many words: every process reports that another one has gone. The first error is the one to mend.
    """
    lines = log.splitlines()
    raised = []
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        if found := RAISED.match(line):
            # What a wrong option is said to be stands in the line below.
            more = f" {following.strip()}" if following.startswith("  ") and not following.startswith("  File") else ""
            raised.append(found.group(1).strip() + more)
    own = [words for words in raised if not any(mark in words for mark in FOLLOWING)]
    if own or raised:
        return (own or raised)[0]
    return next((line.strip() for line in lines if ERROR_LINE.match(line)), "")


class RunningServer:
    """A server that somebody else runs: nothing of it is started, looked at or ended here. A context manager like `VllmServer`.

    Args:
        url: where it is, without a path.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def alive(self) -> bool:
        """Whether it is not known to have ended: whoever asks it will see."""
        return True

    def last_words(self) -> str:
        return ""


class VllmServer:
    """A context manager around one `vllm serve` process on 127.0.0.1.

    Args:
        model: model folder, or a name the model hub knows.
        options: further options of `vllm serve`.
        port: where it listens; None takes a free one.
        log: file for its output; None takes a temporary one.
        start_timeout_s: how long it may take until it is healthy.

    Raises:
        ServerError: on entering, when the port is taken, the process ends, or it is not healthy in time.
    """

    def __init__(
        self,
        model: str | Path,
        options: Sequence[str] = (),
        port: int | None = None,
        log: Path | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.local = Path(model).exists()
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"),
            *options,
        ]
        self._options = tuple(options)
        self._start_timeout_s = start_timeout_s
        self.log = log or Path(tempfile.mkstemp(prefix="agentserve-", suffix=".log")[1])
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[Any] | None = None

    def __enter__(self) -> "VllmServer":
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise ServerError(f"port {self.port} is in use: choose another with --port, or none for a free one")
        self._output = self.log.open("wb")
        # A session of its own: a Ctrl-C in the terminal reaches us, and we stop the server and all it started.
        self._process = subprocess.Popen(
            self.command,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=serving_environment(offline=self.local, options=self._options),
            start_new_session=True,
        )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def tail(self, lines: int = 15) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def last_words(self) -> str:
        """Of a server that did not start or has died: what went wrong first, where its log lies, and the end of that."""
        cause = first_cause(self.log.read_text(errors="replace"))
        return f"{f'{cause}; ' if cause else ''}its log {self.log}\nits log ends with:\n{self.tail()}"

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if not self.alive():
                code = self._process.returncode if self._process is not None else None
                raise ServerError(f"vllm serve ended with exit code {code} while starting: {self.last_words()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.25)
        raise ServerError(
            f"vllm serve was not healthy within {self._start_timeout_s:g} s (give it more with --start-timeout): "
            f"{self.last_words()}"
        )

    def stop(self) -> None:
        """Asks the server to end, then makes it; returns when it and all it started are gone."""
        process, self._process = self._process, None
        if process is not None:
            stop_group(process, ((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)))
        if self._output is not None:
            self._output.close()
            self._output = None
