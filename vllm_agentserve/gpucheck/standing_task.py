"""A task in a child process that stays and answers questions, one at a time; in between it waits at a socket and uses nothing.

Questions and answers are JSON, one a line.
"""

import faulthandler
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_agentserve.gpucheck.check_run import CheckRun
from vllm_agentserve.processes.child import STACK_BEFORE_END_S
from vllm_agentserve.processes.starter import end_group
from vllm_agentserve.processes.task import Task, tail

CONNECT_S = 20.0
POLL_S = 0.1
LEAVE_S = 1.0
"""A child whose socket was closed gets so long to end by itself."""


class StandingTaskError(RuntimeError):
    """A child gave no answer; the message says why, with the last lines it wrote.

    Args:
        ended: whether its process has ended.
        out_of_time: the time of the part was used up, which says nothing of what the child did.
    """

    def __init__(self, message: str, ended: bool = False, out_of_time: bool = False) -> None:
        super().__init__(message)
        self.ended = ended
        self.out_of_time = out_of_time


class StandingTask:
    """The parent's end.

    Args:
        name: of its log, and of the file for what the function returns in the end.
        function: "package.module:function", called with `options` and `socket`, the path for `Answering`. It answers once
            without a question when it is ready.
        limit_s: the child writes the stacks of its threads to its log if it is not ready by then.
        fresh: in a new interpreter, not forked.
    """

    def __init__(
        self, check: CheckRun, name: str, function: str, options: dict[str, Any], limit_s: float, fresh: bool = False
    ) -> None:
        self.name = name
        self._check = check
        self._log = check.folder / "logs" / f"{name}.log"
        self._log.unlink(missing_ok=True)
        self._folder = tempfile.mkdtemp(prefix="agentserve-")
        self._line: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        path = str(Path(self._folder, "socket"))
        self._listener.bind(path)
        self._listener.listen(1)
        self._listener.setblocking(False)
        result = check.folder / "raw" / f"{name}.json"
        task = Task(function, result, limit_s, {**options, "socket": path}, self._log, check.environment)
        self._child = check.starter.start(task, fresh)
        # A new interpreter gets its options only while somebody waits for it.
        self._child.wait(POLL_S)

    def ready(self, limit_s: float) -> Any:
        """Waits for the first answer; returns it.

        Raises:
            StandingTaskError: the child ended, or took longer than `limit_s`.
        """
        end = time.monotonic() + limit_s
        while self._line is None:
            try:
                self._line, _ = self._listener.accept()
            except BlockingIOError:
                code = self._child.wait(POLL_S)
                if code is not None:
                    raise self._error(f"exit code {code}", ended=True) from None
                if time.monotonic() > end:
                    raise self._late(limit_s) from None
        return self._receive(max(end - time.monotonic(), 0.0), limit_s)

    def ask(self, question: dict[str, Any], limit_s: float) -> Any:
        """Sends a question, with `limit_s`; returns the answer.

        Raises:
            StandingTaskError: as for `ready`.
        """
        assert self._line is not None
        try:
            self._line.settimeout(max(limit_s, POLL_S))
            self._line.sendall(json.dumps({**question, "limit_s": limit_s}).encode() + b"\n")
        except OSError as error:
            raise self._ended(error) from None
        return self._receive(limit_s, limit_s)

    def _receive(self, left_s: float, limit_s: float) -> Any:
        assert self._line is not None
        end, data = time.monotonic() + left_s, b""
        while not data.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0:
                raise self._late(limit_s)
            self._line.settimeout(left)
            try:
                more = self._line.recv(1 << 16)
            except TimeoutError:
                raise self._late(limit_s) from None
            except OSError as error:
                raise self._ended(error) from None
            if not more:
                raise self._ended(None)
            data += more
        return json.loads(data)

    def crashed_after_fork(self) -> bool:
        """Whether it was forked, which may be why a signal ended it or it never began; no other child is forked then."""
        code = self._child.wait(0.0)
        crashed = code is not None and (code < 0 or not self._log.exists())
        return crashed and self._check.starter.distrust(self._child)

    def hang_up(self) -> None:
        """Closes the socket, which tells the child to end; does not wait for that."""
        for one in (self._line, self._listener):
            if one is not None:
                one.close()

    def close(self) -> None:
        """Ends the child: what does not end by itself is killed."""
        self.hang_up()
        if self._line is not None:
            self._child.wait(LEAVE_S)
        end_group(self._child)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ended(self, error: OSError | None) -> StandingTaskError:
        code = self._child.wait(LEAVE_S)
        why = f"exit code {code}" if code is not None else "it closed its socket"
        return self._error(why if error is None else f"{why} ({error})", ended=True)

    def _late(self, limit_s: float) -> StandingTaskError:
        return self._error(f"no answer after {limit_s:.0f} s", out_of_time=self._check.left_s() <= POLL_S)

    def _error(self, why: str, ended: bool = False, out_of_time: bool = False) -> StandingTaskError:
        return StandingTaskError(f"{self.name}: {why}\n{tail(self._log)}", ended, out_of_time)


class Answering:
    """The child's end: iterates over questions until the parent closes its end. A context manager.

    Args:
        path: of the socket.
    """

    def __init__(self, path: str) -> None:
        self._line = socket.socket(socket.AF_UNIX)
        self._line.settimeout(CONNECT_S)
        self._line.connect(path)
        self._line.settimeout(None)

    def __enter__(self) -> "Answering":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()

    def answer(self, answer: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._line.sendall(json.dumps(answer).encode() + b"\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._line.makefile("rb") as lines:
            for line in lines:
                question = json.loads(line)
                faulthandler.dump_traceback_later(max(question["limit_s"] - STACK_BEFORE_END_S, 0.1))
                yield question
