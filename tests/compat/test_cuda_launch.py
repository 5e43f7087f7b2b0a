"""A launch that pauses between layers, with vLLM's own hook around attention and its own forward context, without a GPU."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import forward_context
from vllm.distributed.kv_transfer import get_kv_transfer_group, kv_transfer_state
from vllm.model_executor.layers.attention import attention as attention_module
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer

from vllm_agentserve.lanes.cuda.relay import Relay
from vllm_agentserve.vllm_compat.cuda_launch import ForwardState, LayerHook, connector_instead, launching_thread


class Pass:
    """A forward pass of so many layers, with attention as vLLM wraps it."""

    def __init__(self, name: str, layers: int) -> None:
        self.name = name
        self.layers = layers
        self.log: list[tuple[str, str, Any]] = []

    def run(self) -> None:
        with forward_context.override_forward_context(SimpleNamespace(name=self.name)):  # type: ignore[arg-type]
            for layer in range(self.layers):
                self.attention(f"layer {layer}")

    def attention(self, layer_name: str) -> None:
        def unwrapped(layer_name: str) -> None:
            context: Any = forward_context.get_forward_context()
            self.log.append((layer_name, context.name, get_kv_transfer_group()))

        maybe_transfer_kv_layer(unwrapped)(layer_name)


class Engine(LayerHook):
    """Stands for the connector that drives the lane."""

    def __init__(self) -> None:
        super().__init__(lambda: None)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = Engine()
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", made)
    monkeypatch.setattr(attention_module, "get_attention_context", lambda name: ("metadata", None, "cache", None))
    yield made
    assert kv_transfer_state._KV_CONNECTOR_AGENT is made
    assert not forward_context.is_forward_context_available()


def test_a_launch_pauses_before_the_attention_of_a_layer_and_steps_run_meanwhile(engine: Engine) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    relay = Relay(ForwardState(), clock=clock)
    hook = LayerHook(relay.pause)
    chunk, step = Pass("chunk", 6), Pass("step", 2)

    def work() -> None:
        with connector_instead(hook):
            chunk.run()

    relay.begin(work)
    slices = 1
    while not relay.go_on(1.0):
        assert get_kv_transfer_group() is engine
        assert not forward_context.is_forward_context_available()
        step.run()
        slices += 1
    assert slices > 3
    assert chunk.log == [(f"layer {layer}", "chunk", hook) for layer in range(6)]
    assert step.log == [(f"layer {layer}", "step", engine) for layer in range(2)] * (slices - 1)
    relay.close()


def test_a_launch_that_fails_between_two_slices_leaves_no_state_behind(engine: Engine) -> None:
    relay = Relay(ForwardState())
    chunk = Pass("chunk", 3)

    def work() -> None:
        with connector_instead(LayerHook(relay.pause)):
            chunk.run()
            raise RuntimeError("CUDA out of memory")

    relay.begin(work)
    assert not relay.go_on(0.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        relay.go_on()
    relay.close()


def test_the_hook_has_no_scheduler() -> None:
    hook = LayerHook(lambda: None)
    with pytest.raises(NotImplementedError):
        hook.get_num_new_matched_tokens(None, 0)


def test_the_thread_that_launches_has_the_device_and_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps both per thread, and vLLM decorates what it calls itself only."""
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((device, threading.get_ident())))
    seen: list[tuple[bool, int]] = []
    relay = Relay(ForwardState(), lambda: launching_thread("cuda:1"))
    relay.begin(lambda: seen.append((torch.is_inference_mode_enabled(), threading.get_ident())))
    assert relay.go_on()
    ((inference, thread),) = seen
    assert inference
    assert chosen == [("cuda:1", thread)]
    assert thread != threading.get_ident()
    relay.close()
