"""CUDA graphs of decode steps: each slot replays its own, or none; vLLM's graph manager is a fake."""

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from vllm_agentserve.vllm_compat import LaneError
from vllm_agentserve.vllm_compat.cuda_graphs import SlotGraphs


class Mode(enum.Enum):
    NONE = 0
    PIECEWISE = 1
    FULL = 2


@dataclass(frozen=True)
class Shape:
    """As vLLM's `BatchExecutionDescriptor`."""

    cg_mode: Mode
    num_tokens: int
    num_reqs: int | None
    uniform_token_count: int | None = None
    max_query_len: int | None = None
    num_ubatches: int = 1


class Manager:
    """As vLLM's `ModelCudaGraphManager`: a graph is the name of the stream it was captured on."""

    def __init__(self) -> None:
        self.graphs: dict[Shape, str] = {}
        self._capture_descs = {
            Mode.PIECEWISE: [Shape(Mode.PIECEWISE, 256, None)],
            Mode.FULL: [Shape(Mode.FULL, size, size, 1) for size in (128, 64, 8, 1)],
        }

    def _capture_stream(self, desc: Shape) -> str:
        return "plain"

    def capture(self, model: str) -> None:
        for descs in self._capture_descs.values():
            for desc in descs:
                assert desc not in self.graphs
                self.graphs[desc] = f"{model} on {self._capture_stream(desc)}"

    def dispatch(self, num_reqs: int, num_tokens: int, uniform: int | None, num_active_loras: int = 0) -> Shape:
        fitting = [
            one
            for one in self.graphs_of_all_sizes()
            if one.num_tokens >= num_tokens and (one.cg_mode is Mode.PIECEWISE or uniform == 1)
        ]
        return min(fitting, key=lambda one: one.num_tokens, default=Shape(Mode.NONE, num_tokens, num_reqs))

    def graphs_of_all_sizes(self) -> list[Shape]:
        return [one for descs in self._capture_descs.values() for one in descs]


class GraphBench:
    def __init__(self, largest: int = 64) -> None:
        self.manager = Manager()
        self.warmed: list[tuple[str, int]] = []
        self.current = "plain"
        self.slots = SlotGraphs(
            self.manager,
            ["decode0", "decode1"],
            largest,
            lambda tokens: self.warmed.append((self.current, tokens)),
            self.on,
        )

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        self.current = stream
        yield
        self.current = "plain"

    def replayed(self, requests: int, tokens: int, uniform: int | None) -> str | None:
        """The graph that a step of this shape replays, None for none."""
        shape = self.manager.dispatch(requests, tokens, uniform, num_active_loras=0)
        if shape.cg_mode is Mode.NONE:
            assert (shape.num_reqs, shape.num_tokens) == (requests, tokens), "a step without graph is not padded"
            return None
        return self.manager.graphs[shape]


def test_every_slot_replays_graphs_of_its_own_stream() -> None:
    bench = GraphBench()
    bench.manager.capture("model")
    assert bench.manager.graphs[Shape(Mode.FULL, 8, 8, 1)] == "model on plain"
    for slot, stream in ((0, "decode0"), (1, "decode1"), (None, "plain")):
        bench.slots.select(slot)
        assert bench.replayed(5, 5, 1) == f"model on {stream}"
    assert bench.warmed == [("decode0", 64), ("decode1", 64)]


def test_without_a_graph_of_its_own_a_slot_runs_without() -> None:
    """Neither the device's graphs of larger batches, nor its piecewise ones."""
    bench = GraphBench()
    bench.manager.capture("model")
    assert bench.replayed(100, 100, 1) == "model on plain"
    assert bench.replayed(3, 200, None) == "model on plain"
    bench.slots.select(1)
    assert bench.replayed(100, 100, 1) is None
    assert bench.replayed(3, 200, None) is None
    assert bench.replayed(64, 64, 1) == "model on decode1"


@pytest.mark.parametrize("largest", [0, 64])
def test_slots_have_no_graphs_before_or_without_capture(largest: int) -> None:
    bench = GraphBench(largest)
    if largest == 0:
        bench.manager.capture("model")
    bench.slots.select(0)
    assert bench.replayed(5, 5, 1) is None
    assert bench.warmed == []


def test_a_step_without_graph_says_nothing_of_the_graph_that_was_found() -> None:
    bench = GraphBench()
    bench.manager._capture_descs[Mode.FULL] = [Shape(Mode.FULL, 128, 128, 1, max_query_len=1)]
    bench.manager.capture("model")
    bench.slots.select(0)
    assert bench.manager.dispatch(100, 100, 1) == Shape(Mode.NONE, 100, 100)


def test_slots_have_no_graphs_of_split_batches() -> None:
    """Micro-batches are refused at start; their graphs would run on streams of their own."""
    bench = GraphBench()
    split = Shape(Mode.FULL, 32, 32, 1, num_ubatches=2)
    bench.manager._capture_descs[Mode.FULL].append(split)
    bench.manager.capture("model")
    assert split in bench.manager.graphs
    bench.slots.select(0)
    assert {one.num_tokens for one in bench.manager.graphs} == {64, 8, 1}


def test_after_capture_and_close_the_manager_is_stock() -> None:
    bench = GraphBench()
    every = bench.manager.graphs_of_all_sizes()
    bench.manager.capture("model")
    assert bench.manager.graphs_of_all_sizes() == every
    assert bench.manager._capture_stream(every[0]) == "plain"
    bench.slots.select(1)
    bench.slots.close()
    assert bench.replayed(5, 5, 1) == "model on plain"
    bench.manager.graphs.clear()
    bench.manager.capture("again")
    assert bench.warmed == [("decode0", 64), ("decode1", 64)]


def test_slots_whose_graphs_do_not_fit_are_refused() -> None:
    bench = GraphBench()
    stock = bench.slots._stock_capture

    def capture(*args: Any) -> None:
        if bench.warmed:
            raise RuntimeError("CUDA out of memory")
        stock(*args)

    bench.slots._stock_capture = capture
    with pytest.raises(LaneError, match=r"decode slot 0 could not be captured: CUDA out of memory. Lower --gpu-memory"):
        bench.manager.capture("model")
    assert bench.manager._capture_stream(Shape(Mode.FULL, 8, 8)) == "plain"


def test_slots_without_graphs_are_warmed_up_and_their_memory_is_seen() -> None:
    bench = GraphBench()
    seen: list[int] = []

    @contextmanager
    def taking(slot: int) -> Iterator[None]:
        seen.append(slot)
        yield

    bench.slots._taking = taking
    bench.manager.capture("model")
    bench.slots.warm_steps()
    assert (seen, bench.warmed) == ([0, 1], [("decode0", 64), ("decode1", 64)]), "those with graphs are warm"

    bench = GraphBench(largest=0)
    bench.slots._taking = taking
    bench.slots.warm_steps()
    bench.slots.warm_steps()
    assert (seen, bench.warmed) == ([0, 1, 0, 1], [("decode0", 1), ("decode1", 1)])
