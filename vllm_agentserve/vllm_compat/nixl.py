"""NIXL, which moves KV between engines: its progress thread, made to wait.

It looks for transfers without a pause, and takes half a core or more of an engine that has nothing to do. NIXL has a setting
for the pause between two looks, which its Python interface sets to 0; vLLM has no option for it.
"""

import os
from typing import Any

PAUSE = "AGENTSERVE_NIXL_PAUSE_US"
"""Names the pause in the environment of an engine; without it nothing is changed."""
PAUSE_US = 1000
"""What engines of a cluster get: 0.02 cores of an idle engine, and up to so much more until a transfer begins."""


def pause_progress_thread() -> bool:
    """Makes the progress threads of agents that are made from now on wait as long as the environment says.

    Returns whether they will. Retired by: an option of NIXL's Python interface for `nixlAgentConfig.pthrDelay`.
    """
    given = os.environ.get(PAUSE, "")
    if not given.isdecimal() or int(given) == 0:
        return False
    from vllm.distributed import nixl_utils

    agent = nixl_utils.NixlWrapper
    bindings: Any = getattr(getattr(agent, "__init__", None), "__globals__", {}).get("nixlBind")
    stock = getattr(bindings, "nixlAgentConfig", None)
    if stock is None or not hasattr(stock, "pthrDelay"):
        return False
    if not getattr(stock, "agentserve", False):
        bindings.nixlAgentConfig = with_pause(stock, int(given))
    return True


def with_pause(stock: Any, pause_us: int) -> Any:
    """The class of configurations whose progress thread has that pause where it is given none."""

    class PausedAgentConfig(stock):
        agentserve = True

        @property
        def pthrDelay(self) -> int:
            return int(stock.pthrDelay.__get__(self))

        @pthrDelay.setter
        def pthrDelay(self, value: int) -> None:
            stock.pthrDelay.__set__(self, value or pause_us)

    return PausedAgentConfig
