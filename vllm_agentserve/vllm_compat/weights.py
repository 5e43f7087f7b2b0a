"""Calls that replace or unmap weights while the engine runs: refused in a worker that has a prefill lane."""

from collections.abc import Callable
from typing import Any

from vllm_agentserve.vllm_compat import LaneError
from vllm_agentserve.vllm_compat.lanes import CONNECTOR, local_worker_half

UPDATES = (
    "reload_weights",
    "reset_weights",
    "init_weight_transfer_engine",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
    "sleep",
)
"""Methods of vLLM's workers, called over `collective_rpc`, that write or unmap weights, or prepare for it. `sleep` may be called
without sleep mode too, and unmaps memory then where vLLM's own allocator is on."""


def refuse_weight_updates() -> None:
    """Makes these methods of vLLM's worker raise `LaneError` while the engine has a prefill lane, or is going to make one; others
    stay as they are.

    On CPUs the lane has a copy of the weights that no update reaches. On GPUs a chunk may be reading them, on a stream that the
    update does not wait for, and the KV of one prompt would come from both old and new ones.

    Retired by: a hook of connectors before weights are written.
    """
    from vllm.v1.worker.gpu_worker import Worker

    for name in UPDATES:
        stock = getattr(Worker, name)
        if not getattr(stock, "agentserve", False):
            setattr(Worker, name, refusing(name, stock))


def refusing(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if has_connector(self.vllm_config) and may_have_lane():
            raise LaneError(refusal(name))
        return stock(self, *args, **kwargs)

    method.agentserve = True  # type: ignore[attr-defined]
    return method


def refusal(name: str) -> str:
    """Why a call of that name is refused."""
    return (
        f"{name} is refused: the prefill lane may be computing with the weights, or has its own copy; "
        "start the server with mode 'time-sliced' for it"
    )


def may_have_lane() -> bool:
    """Whether the worker's half of the connector has a lane, or has not tried to make one yet."""
    half = local_worker_half()
    return half is None or bool(half.may_have_lane)


def has_connector(vllm_config: Any) -> bool:
    """Whether this engine's connector is the one that carries two lanes."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR
