"""With which command, when and where a benchmark ran: what every report begins with."""

import os
import platform
import sys
import time

from vllm_agentserve.vllm_compat import installed_vllm


def circumstances(module: str) -> dict[str, str | None]:
    """Args: the full name of the benchmark's module, as `__spec__.name` has it."""
    return {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "vllm": installed_vllm(),
    }
