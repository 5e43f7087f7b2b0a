"""One task in a process of its own; its options come on standard input, as JSON.

python -m vllm_agentserve.processes.child FUNCTION RESULT LIMIT_S [PARENT]   # see `main`; never by hand
"""

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

STACK_BEFORE_END_S = 2.0
"""A child writes the stacks of its threads to its log so long before its time is up."""


PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """From now on the kernel ends this process with the thread that made it: a parent that is killed leaves nothing behind."""
    # Linux has this call; elsewhere no GPU is served.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Arguments: PACKAGE.MODULE:FUNCTION, the file for the result, the time limit in seconds, and the parent it ends with, where
    that is not arranged yet."""
    if len(sys.argv) > 4:
        end_with_parent()
        if os.getppid() != int(sys.argv[4]):
            return  # it was killed before we asked
    work(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), json.load(sys.stdin))


def work(function: str, result: Path, limit_s: float, options: Any) -> None:
    """Calls the function, writes what it returns, and ends the process."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(limit_s - STACK_BEFORE_END_S, 0.1))
    module, _, name = function.partition(":")
    task = getattr(importlib.import_module(module), name)
    answer = json.dumps(task(options))
    faulthandler.cancel_dump_traceback_later()
    # In one move, so that a file that is there is whole.
    partial = result.with_suffix(".part")
    partial.write_text(answer + "\n")
    partial.replace(result)
    # Taking down CUDA, an engine and its threads proves nothing, takes seconds and may hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
