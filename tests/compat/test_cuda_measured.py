"""What `LaneMemory` measures, call by call: torch's allocator is a fake that has memory of several streams and pools."""

from collections.abc import Callable
from typing import Any

import pytest

from vllm_agentserve.vllm_compat import LaneError
from vllm_agentserve.vllm_compat.cuda_memory import LaneMemory, slots_taken

MIB = 1 << 20
CURRENT, GRAPHS = 5, (1, 0)


class Cuda:
    """As `torch.cuda`. Caches may be emptied only when nothing runs: a chunk's temporaries are still in use until then."""

    def __init__(self) -> None:
        self.free, self.reserved = 1000 * MIB, 0
        self.segments: list[dict[str, Any]] = []
        self.runs = True

    def synchronize(self) -> None:
        self.runs = False

    def empty_cache(self) -> None:
        assert not self.runs, "something runs"

    def mem_get_info(self) -> tuple[int, int]:
        return self.free, 2000 * MIB

    def memory_reserved(self) -> int:
        return self.reserved

    def memory_snapshot(self) -> list[dict[str, Any]]:
        return self.segments

    def current_stream(self) -> Any:
        class Stream:
            cuda_stream = CURRENT

        return Stream()

    def segment(self, stream: int, size: int, used: int = 0, pool: tuple[int, int] = (0, 0)) -> None:
        self.segments.append(
            {"stream": stream, "total_size": size * MIB, "allocated_size": used * MIB, "segment_pool_id": pool}
        )


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    monkeypatch.delenv("VLLM_ENABLE_STARTUP_PLAN", raising=False)
    return Cuda()


@pytest.mark.parametrize("call", [LaneMemory.begin, LaneMemory.chunks_ended])
def test_nothing_runs_when_caches_are_emptied(cuda: Cuda, call: Callable[[LaneMemory], None]) -> None:
    call(LaneMemory(cuda))
    assert not cuda.runs


@pytest.mark.parametrize(
    ("segments", "step", "fits"),
    [
        ([(CURRENT, 300, 0, (0, 0))], 300, True),
        ([(CURRENT, 300, 0, (0, 0))], 200, True),
        ([(CURRENT, 300, 0, (0, 0))], 301, False),
        ([(CURRENT, 400, 100, (0, 0))], 301, False),
        ([(9, 300, 0, (0, 0))], 300, False),
        ([(CURRENT, 300, 0, GRAPHS)], 300, False),
        ([(CURRENT, 300, 0, GRAPHS), (CURRENT, 300, 0, (0, 0))], 600, False),
        ([(CURRENT, 200, 0, (0, 0)), (CURRENT, 100, 0, (0, 0))], 300, True),
    ],
)
def test_a_step_is_served_by_what_its_stream_has_cached(
    cuda: Cuda, segments: list[tuple[int, int, int, tuple[int, int]]], step: int, fits: bool
) -> None:
    """Neither by what is in use, nor by the caches of other streams, nor by the pool of CUDA graphs."""
    for segment in segments:
        cuda.segment(*segment)
    cuda.free = 50 * MIB
    memory = LaneMemory(cuda)
    memory.cached = 50 * MIB
    if fits:
        memory.refuse(step * MIB)
    else:
        with pytest.raises(LaneError, match="50 MiB are left on the device"):
            memory.refuse(step * MIB)


def test_what_decode_slots_have_taken_is_known_while_the_lane_lives(cuda: Cuda) -> None:
    memory = LaneMemory(cuda)
    memory.begin()
    assert slots_taken() == 0
    for slot, size in ((0, 40), (1, 30), (0, 5)):
        with memory.taking(slot):
            cuda.free -= size * MIB
    memory.by_stream["prefill 0"] = 500 * MIB
    assert memory.by_stream["decode 0"] == 45 * MIB
    assert slots_taken() == 75 * MIB
    del memory
    assert slots_taken() == 0
