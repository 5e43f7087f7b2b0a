"""A stack of decoder layers in plain torch, and its throughput on shares of the device; imported in child processes only."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from vllm_agentserve.gpucheck.step_kinds import LAYERS, SMALL_STEP_KINDS, STEP_KINDS, DeviceShare, StepKind
from vllm_agentserve.shapes import ModelShape

REPEAT_S = 0.25
"""Each point is measured for about so long."""


class DecoderLayers:
    """Decoder layers of a shape with random weights, and the KV of one context per work."""

    def __init__(self, shape: ModelShape, device: str) -> None:
        self.shape = shape
        self.device = device
        # bfloat16 is what is served on GPUs; on CPUs without its instructions it would measure their emulation.
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.head = shape.hidden // shape.heads
        kv = shape.kv_heads * self.head
        self.layers = [
            (
                self._matrix(shape.hidden, shape.hidden + 2 * kv),
                self._matrix(shape.hidden, shape.hidden),
                self._matrix(shape.hidden, 2 * shape.inner),
                self._matrix(shape.inner, shape.hidden),
            )
            for _ in range(LAYERS)
        ]

    def _matrix(self, rows: int, columns: int) -> Any:
        return torch.randn(rows, columns, device=self.device, dtype=self.dtype) * rows**-0.5

    def step_of(self, work: StepKind) -> Callable[[], None]:
        """A call that computes one step of the work."""
        shape, head = self.shape, self.head
        hidden = torch.randn(work.batch * work.tokens, shape.hidden, device=self.device, dtype=self.dtype)
        kv = (work.batch, shape.kv_heads, work.context + work.tokens, head)
        keys = torch.randn(kv, device=self.device, dtype=self.dtype)
        values = torch.randn(kv, device=self.device, dtype=self.dtype)
        sizes = [shape.hidden, shape.kv_heads * head, shape.kv_heads * head]

        def step() -> None:
            flow = hidden
            for qkv, out, up, down in self.layers:
                queries = (flow @ qkv).split(sizes, dim=-1)[0]
                queries = queries.view(work.batch, work.tokens, shape.heads, head).transpose(1, 2)
                # A resumed prompt attends to all of its context: leaving out the mask of its few own tokens changes little.
                seen = scaled_dot_product_attention(queries, keys, values, is_causal=not work.context, enable_gqa=True)
                flow = flow + seen.transpose(1, 2).reshape(flow.shape) @ out
                gate, rest = (flow @ up).chunk(2, dim=-1)
                flow = flow + (silu(gate) * rest) @ down

        return step


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within, torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def core_shares() -> list[DeviceShare]:
    """Every number of cores from one to all that this process may use; a call returns when it is done."""
    cores = len(os.sched_getaffinity(0))
    return [DeviceShare(count, partial(threads, count), lambda: None) for count in range(1, cores + 1)]


def timed(step: Callable[[], None], wait: Callable[[], None]) -> float:
    """Seconds per call, after one that does not count."""
    step()
    wait()
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < REPEAT_S:
        # Several calls are launched before the device is waited for: it never idles, and the queue stays short.
        for _ in range(4):
            step()
        calls += 4
        wait()
    return (time.perf_counter() - began) / calls


def measure(options: Mapping[str, Any]) -> dict[str, Any]:
    """All works on all shares; tokens per second of the stack.

    Args:
        options: `shape` (of `shapes.ModelShape`), `device` and `small`.
    """
    on_gpu = options["device"] == "cuda"
    if on_gpu:
        from vllm_agentserve.gpucheck.multiprocessors import multiprocessor_shares

        shares = multiprocessor_shares()
    else:
        shares = core_shares()
    stack = DecoderLayers(ModelShape(**options["shape"]), options["device"])
    points: list[dict[str, Any]] = []
    with torch.inference_mode():
        for work in SMALL_STEP_KINDS if options["small"] else STEP_KINDS:
            step = stack.step_of(work)
            for share in shares:
                with share.entered():
                    seconds = timed(step, share.wait)
                tokens = work.batch * work.tokens
                points.append({"work": work.name, "units": share.units, "tokens_per_s": tokens / seconds})
    return {"unit": "multiprocessors" if on_gpu else "cores", "points": points}
