"""What commands need beyond vLLM's own requirements, and which extra of this package brings it."""

from importlib.util import find_spec

EXTRAS = {
    "cli": ("prometheus_client", "rich"),
    "bench": (
        *("aiohttp", "jinja2", "matplotlib", "msgspec", "numpy", "prometheus_client", "psutil", "rich", "scipy"),
        "uvloop",
    ),
    "cluster": ("aiohttp", "msgspec", "ray"),
}
"""Modules by extra. NVML is left out: without it `agentserve bench` says nothing of a GPU's power and clocks."""

VLLM = ("msgspec", "numpy", "prometheus_client", "safetensors", "tokenizers", "torch", "triton", "vllm")
"""What is imported outside of the commands with an extra: vLLM, and modules that it brings."""


class MissingExtraError(RuntimeError):
    """A command needs modules that are not installed; the message names the command, the modules and the remedy."""


def require(command: str, extra: str) -> None:
    """Raises `MissingExtraError` where a module of that extra is not installed; "" is no extra. Imports nothing."""
    missing = [module for module in EXTRAS.get(extra, ()) if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"agentserve {command} needs {', '.join(missing)}{install(extra)}")


def remedy_for(module: str | None, extra: str) -> str | None:
    """What brings a module that could not be imported; None where nothing that can be installed is known to.

    Args:
        module: its full name, as in `ModuleNotFoundError.name`.
        extra: the one of the command; it is named first, since it brings some of what vLLM brings too.
    """
    package = (module or "").partition(".")[0]
    if not package or find_spec(package) is not None:
        # A part of a package that is installed: ours, or one that is broken or of another version.
        return None
    if package in EXTRAS.get(extra, ()):
        return install(extra)
    if package in VLLM:
        return ", which vLLM brings: install vLLM beside this package"
    return next((install(name) for name, modules in EXTRAS.items() if package in modules), None)


def install(extra: str) -> str:
    return f": pip install 'vllm-agentserve[{extra}]'"
