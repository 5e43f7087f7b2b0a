"""A chunk's launch cut into slices between layers: where it may pause, and what of vLLM's state is swapped meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm import forward_context
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1


class LayerHook(KVConnectorBase_V1):
    """Stands where a KV connector would, while the lane computes: vLLM asks it for every layer, before attention. It transfers
    nothing.

    Retired by: a callback per layer that is no connector.
    """

    def __init__(self, pause: Callable[[], None]) -> None:
        # Without vLLM's own: there is no configuration, and nothing is registered.
        self._pause = pause

    def has_connector_metadata(self) -> bool:
        """Whether vLLM is to ask for every layer."""
        return True

    def wait_for_layer_load(self, layer_name: str) -> None:
        """The layer's inputs are launched, and its attention is next."""
        self._pause()

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        raise NotImplementedError("the hook of the lane's layers has no scheduler")

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        raise NotImplementedError("the hook of the lane's layers has no scheduler")

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        raise NotImplementedError("the hook of the lane's layers has no scheduler")


@contextmanager
def connector_instead(connector: Any) -> Iterator[None]:
    """Within, this is vLLM's KV connector, None for none: layers and runners of the lane must not call the one that drives it.

    Retired by: `load_model` and `initialize_kv_cache` taking a connector, and attention taking it from the forward context.
    """
    agent = kv_transfer_state._KV_CONNECTOR_AGENT
    kv_transfer_state._KV_CONNECTOR_AGENT = connector
    try:
        yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = agent


class ForwardState:
    """vLLM's state of a forward pass that is kept per process: the context of its layers, and the connector they ask."""

    def take(self) -> Any:
        return forward_context._forward_context, kv_transfer_state._KV_CONNECTOR_AGENT

    def put(self, state: Any) -> None:
        forward_context._forward_context, kv_transfer_state._KV_CONNECTOR_AGENT = state


@contextmanager
def launching_thread(device: Any) -> Iterator[None]:
    """What torch keeps per thread, for one that launches chunks on `device`."""
    torch.cuda.set_device(device)
    with torch.inference_mode():
        yield
