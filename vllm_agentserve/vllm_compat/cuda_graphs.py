"""CUDA graphs of vLLM's decode steps, one set per slot: a graph runs on the multiprocessors it was captured on."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from vllm_agentserve.vllm_compat import LaneError


class SlotGraphs:
    """Sits on the graph manager of vLLM's own runner. With no slot selected the manager does as stock; with one, only graphs
    captured on its stream are replayed, and everything else runs without graph.

    Graphs of all sets share vLLM's memory pool: no two decode steps run at once.

    Args:
        manager: vLLM's `ModelCudaGraphManager`.
        streams: of the decode lane, per slot.
        largest: batches of more tokens get no graph on the slots; 0 for none at all.
        warm: runs a step of so many tokens without graph on the current stream.
        on: makes a stream the current one, as `torch.cuda.stream`.
        taking: around what takes memory for a slot.

    Retired by: `CudaGraphManager` keeping a graph per (descriptor, stream), with `_capture_stream` as its public hook.
    """

    def __init__(
        self,
        manager: Any,
        streams: Sequence[Any],
        largest: int,
        warm: Callable[[int], None],
        on: Callable[[Any], Any],
        taking: Callable[[int], Any] = lambda slot: nullcontext(),
    ) -> None:
        self._manager = manager
        self._streams = list(streams)
        self._largest = largest
        self._warm = warm
        self._on = on
        self._taking = taking
        self._cold = set(range(len(self._streams)))
        """Slots on whose stream no step has run."""
        self._plain = manager.graphs
        self._sets: list[dict[Any, Any]] = [{} for _ in streams]
        self._slot: int | None = None
        self._stock_capture = manager.capture
        self._stock_dispatch = manager.dispatch
        manager.capture = self._capture
        manager.dispatch = self._dispatch

    def select(self, slot: int | None) -> None:
        """The next steps run on this slot, None for the whole device."""
        self._slot = slot
        self._manager.graphs = self._plain if slot is None else self._sets[slot]

    def _capture(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, then once more on every slot. Raises `LaneError` when a slot's graphs do not fit."""
        self.select(None)
        self._stock_capture(*args, **kwargs)
        self._plain = self._manager.graphs
        for slot, stream in enumerate(self._streams):
            try:
                with self._taking(slot):
                    self._sets[slot] = self._captured_on(slot, stream, args, kwargs)
            except RuntimeError as error:
                raise LaneError(
                    f"CUDA graphs of decode slot {slot} could not be captured: {error}. Lower --gpu-memory-utilization, or "
                    "set --enforce-eager, or use mode 'time-sliced'"
                ) from error

    def _captured_on(self, slot: int, stream: Any, args: Any, kwargs: Any) -> dict[Any, Any]:
        manager, every, graphs = self._manager, self._manager._capture_descs, dict[Any, Any]()
        # Piecewise graphs belong to the compiled module, which has one set only.
        wanted = {
            mode: [one for one in descs if one.num_tokens <= self._largest and one.num_ubatches == 1]
            for mode, descs in every.items()
            if mode.name == "FULL"
        }
        sizes = [one.num_tokens for descs in wanted.values() for one in descs]
        if not sizes:
            return graphs
        # Libraries allocate per stream when they first see it, which must not land in the graphs' memory pool.
        with self._on(stream):
            self._warm(max(sizes))
        self._cold.discard(slot)
        manager._capture_descs, manager.graphs = wanted, graphs
        manager._capture_stream = lambda desc: stream
        try:
            self._stock_capture(*args, **kwargs)
        finally:
            manager._capture_descs, manager.graphs = every, self._plain
            del manager._capture_stream
        return graphs

    def warm_steps(self) -> None:
        """Runs a step on every slot that has captured nothing, so that what its stream needs is taken and seen."""
        for slot in sorted(self._cold):
            with self._taking(slot), self._on(self._streams[slot]):
                self._warm(max(self._largest, 1))
        self._cold.clear()

    def _dispatch(self, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        found = self._stock_dispatch(num_reqs, num_tokens, *args, **kwargs)
        if self._slot is None or found.cg_mode.name == "NONE" or found in self._sets[self._slot]:
            return found
        return replace(
            found,
            cg_mode=type(found.cg_mode).NONE,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            uniform_token_count=None,
            max_query_len=None,
        )

    def close(self) -> None:
        """Drops the slots' graphs; the manager is stock again."""
        self.select(None)
        self._sets.clear()
        self._manager.capture = self._stock_capture
        self._manager.dispatch = self._stock_dispatch
