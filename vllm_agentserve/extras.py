"""What commands need beyond vLLM's own requirements, and which extra of this package brings it."""

from importlib.util import find_spec

EXTRAS = {
    "cli": ("prometheus_client", "rich"),
    "bench": (
        *("aiohttp", "jinja2", "matplotlib", "msgspec", "numpy", "prometheus_client", "psutil", "rich", "scipy"),
        "uvloop",
    ),
}
"""Modules by extra. NVML is left out: without it `agentserve bench` says nothing of a GPU's power and clocks."""


class MissingExtraError(RuntimeError):
    """A command needs modules that are not installed; the message names the command, the modules and the remedy."""


def require(command: str, extra: str) -> None:
    """Raises `MissingExtraError` where a module of that extra is not installed; "" is no extra. Imports nothing."""
    missing = [module for module in EXTRAS.get(extra, ()) if find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"agentserve {command} needs {', '.join(missing)}: pip install 'vllm-agentserve[{extra}]'"
        )
