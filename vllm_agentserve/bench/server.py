"""A `vllm serve` of our own: started, waited for, stopped, and nothing left behind."""

import contextlib
import os
import shutil
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

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0


class ServerError(RuntimeError):
    """The server did not start or died; the message ends with the last lines of its log."""


def free_port() -> int:
    """A TCP port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serving_environment(base: Mapping[str, str] | None = None, offline: bool = True) -> dict[str, str]:
    """The environment for vLLM, by default without a model hub; without an NVIDIA driver, on all cores of the CPU."""
    environment = dict(os.environ if base is None else base)
    if offline:
        environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not has_nvidia_driver():
        environment.setdefault("VLLM_TARGET_DEVICE", "cpu")
        # vLLM's own default leaves one core to the rest of the system, which on two cores is half of them.
        last = (os.cpu_count() or 1) - 1
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{last}")
    return environment


def has_nvidia_driver() -> bool:
    """Whether vLLM would find an NVIDIA GPU's driver here; under WSL only nvidia-smi tells."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


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

    def tail(self) -> str:
        return ""


class VllmServer:
    """A context manager around one `vllm serve` process on 127.0.0.1.

    Args:
        model: model folder, or a name the model hub knows.
        options: further options of `vllm serve`.
        port: where it listens; None takes a free one.
        log: file for its output; None takes a temporary one.

    Raises:
        ServerError: on entering, when the port is taken, the process ends, or it is not healthy in time.
    """

    def __init__(
        self, model: str | Path, options: Sequence[str] = (), port: int | None = None, log: Path | None = None
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.local = Path(model).exists()
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"),
            *options,
        ]
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
            env=serving_environment(offline=self.local),
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

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self.alive():
                code = self._process.returncode if self._process is not None else None
                raise ServerError(
                    f"vllm serve ended with exit code {code} while starting; its log {self.log}:\n{self.tail()}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.25)
        raise ServerError(
            f"vllm serve was not healthy within {START_TIMEOUT_S:.0f} s; its log {self.log}:\n{self.tail()}"
        )

    def stop(self) -> None:
        """Asks the server to end, then makes it; returns when it and all it started are gone."""
        process, self._process = self._process, None
        if process is not None:
            for kind, patience in ((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
                if not _group_alive(process.pid):
                    break
                _signal_group(process.pid, kind)
                deadline = time.monotonic() + patience
                while time.monotonic() < deadline and _group_alive(process.pid):
                    process.poll()
                    time.sleep(0.05)
            process.wait()
        if self._output is not None:
            self._output.close()
            self._output = None


def _signal_group(group: int, kind: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, kind)


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
