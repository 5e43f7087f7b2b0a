"""GPU memory of a prefill lane: what is kept free for it before the KV cache is sized, and what its warm-up was seen to take."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.reserve import CHUNK_TOKENS, DECODE_SHARES, MIB, Reserve, lane_reserve, shortfall
from vllm_agentserve.vllm_compat import LaneError

DECODE = "decode "
"""Before the number of a slot: the name of its decode stream."""
DRIVER = "driver"
"""In place of a stream's name: what was taken outside of torch."""
NO_POOL = (0, 0)
"""Of memory that belongs to no pool of CUDA graphs."""
BUFFERS = "buffers"
"""In place of a stream's name: what the second runner keeps."""


_lanes: "dict[str, weakref.ref[LaneMemory]]" = {}


@contextmanager
def sampler_surplus(runner: Any, cuda: Any) -> Iterator[list[int]]:
    """While vLLM profiles its largest step: by how many bytes the peak of sampling is above that of the forward pass before it.

    vLLM's profile has the higher of both peaks. A chunk of the lane is a forward pass alone.

    Args:
        runner: vLLM's own model runner. Its method is stock again after the first call, and at the end.
        cuda: `torch.cuda`.

    Yields:
        A list that the surplus is added to; it stays empty where vLLM does not sample.

    Retired by: vLLM's profile telling the peak of the forward pass.
    """
    found: list[int] = []

    def sampler_run(*args: Any, **kwargs: Any) -> Any:
        del runner._dummy_sampler_run
        forward = int(cuda.max_memory_allocated())
        sampled = runner._dummy_sampler_run(*args, **kwargs)
        found.append(int(cuda.max_memory_allocated()) - forward)
        return sampled

    runner._dummy_sampler_run = sampler_run
    try:
        yield found
    finally:
        vars(runner).pop("_dummy_sampler_run", None)


def slots_taken() -> int:
    """Bytes that the decode slots of this process's lane have taken so far; 0 without a lane."""
    memory = _lanes["lane"]() if _lanes else None
    return 0 if memory is None else sum(size for name, size in memory.by_stream.items() if name.startswith(DECODE))


@contextmanager
def captured_without_slots(runner: Any) -> Iterator[None]:
    """While vLLM captures its graphs: what it takes them to need is without what the slots took, which the reserve holds. vLLM
    saves a startup plan from this figure.

    Retired by: connectors that can reserve memory.
    """
    stock = runner.capture_model

    def capture_model(*args: Any, **kwargs: Any) -> int:
        before = slots_taken()
        return int(stock(*args, **kwargs)) - (slots_taken() - before)

    runner.capture_model = capture_model
    try:
        yield
    finally:
        del runner.capture_model


def reserve_for(vllm_config: Any, activation: int, graph_bytes: int, major: int) -> Reserve:
    """What the lane of this worker is expected to take.

    Args:
        vllm_config: of the worker.
        activation: bytes of the temporaries at the peak of the forward pass in vLLM's profiled step.
        graph_bytes: vLLM's estimate for one set of all its CUDA graphs; 0 where there is none.
        major: compute capability.
    """
    options = AgentServeConfig.from_additional_config(vllm_config.additional_config)
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or []
    captured = sum(size <= options.lane_cudagraph_tokens for size in sizes)
    return lane_reserve(
        activation=activation,
        step_tokens=scheduler.max_num_batched_tokens,
        context_tokens=model.max_model_len,
        base=options.lane_chunk_tokens or CHUNK_TOKENS,
        shares=DECODE_SHARES if options.lane_decode_share is None else (options.lane_decode_share,),
        graph_tokens=options.lane_cudagraph_tokens,
        graph_set=graph_bytes * captured // len(sizes) if sizes else 0,
        vocabulary=model.get_vocab_size(),
        major=major,
    )


class LaneMemory:
    """Measures what the lane takes, from its making to the end of warm-up.

    Between `begin` and `chunks_ended` nothing but the lane may allocate.

    Args:
        cuda: `torch.cuda`.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._free = self._reserved = 0
        self.by_stream: dict[str, int] = {}
        """Bytes by name of a stream, and those of the driver under `DRIVER`."""
        self.cached = 0
        """Bytes of temporaries: given back after warm-up, and taken again in service."""

    @property
    def total(self) -> int:
        return sum(self.by_stream.values())

    def _settle(self) -> tuple[int, int]:
        """Bytes free on the device, and bytes that torch holds."""
        self._cuda.synchronize()
        return int(self._cuda.mem_get_info()[0]), int(self._cuda.memory_reserved())

    def begin(self) -> None:
        """The lane is about to be made."""
        _lanes["lane"] = weakref.ref(self)
        self._cuda.synchronize()
        self._cuda.empty_cache()
        self._free, self._reserved = self._settle()

    def chunk_seen(self, name: str, stream: Any) -> None:
        """A chunk was computed on this stream. torch empties the caches of others when the device has no more, so every stream
        is looked at when its own chunk has just ended."""
        self._cuda.synchronize()
        own = [one for one in self._cuda.memory_snapshot() if one["stream"] == stream.cuda_stream]
        self.by_stream[name] = sum(int(one["total_size"]) for one in own)
        self.cached += sum(int(one["total_size"]) - int(one["allocated_size"]) for one in own)

    def chunks_ended(self) -> None:
        """`chunk_seen` was called for every stream. Empties torch's caches.

        Raises:
            LaneError: what is left does not suffice to compute them again.
        """
        free, reserved = self._settle()
        taken = reserved - self._reserved
        self.by_stream[DRIVER] = max(self._free - free - taken, 0)
        self._cuda.empty_cache()
        _, reserved = self._settle()
        # The second runner's own buffers are not on the streams of the lane; what the streams keep is no cache.
        kept = sum(size for name, size in self.by_stream.items() if name != DRIVER) - self.cached
        self.by_stream[BUFFERS] = max(reserved - self._reserved - kept, 0)
        self.refuse()

    @contextmanager
    def taking(self, slot: int) -> Iterator[None]:
        """Around the first steps and the capture of graphs on the stream of a decode slot."""
        before, _ = self._settle()
        yield
        name = f"{DECODE}{slot}"
        self.by_stream[name] = self.by_stream.get(name, 0) + max(before - self._settle()[0], 0)

    def refuse(self, step: int = 0) -> None:
        """Raises `LaneError` when what is free on the device does not suffice for chunks on every stream and for a step.

        Args:
            step: bytes of the temporaries of vLLM's largest step, 0 where they are not known. What the current stream has cached
                serves it.
        """
        from vllm import envs

        free, _ = self._settle()
        current = self._cuda.current_stream().cuda_stream
        own = sum(
            int(one["total_size"]) - int(one["allocated_size"])
            for one in self._cuda.memory_snapshot()
            if one["stream"] == current and one.get("segment_pool_id", NO_POOL) == NO_POOL
        )
        found = shortfall(free, self.cached + max(step - own, 0))
        if found is None:
            return
        if envs.VLLM_ENABLE_STARTUP_PLAN:
            found += (
                ". VLLM_ENABLE_STARTUP_PLAN is set: if the plan was saved by another version of this plugin, remove the folder "
                "startup_plan from vLLM's cache"
            )
        raise LaneError(found)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in self.by_stream.items())
        return f"{self.total / MIB:.0f} MiB ({parts})"
