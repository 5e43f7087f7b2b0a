"""The worker of vLLM's OffloadingConnector on CPUs: every block goes to its place and comes back from there."""

import random
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from vllm_agentserve.vllm_compat.cpu_offload import BlockCopies, NumpyOffloadingSpec, runs
from vllm_agentserve.vllm_compat.host import transfer_options

PAGES = (24, 8, 40)
"""Bytes per block in three tensors; the first two are layers of one group, the third that of another one."""
BLOCKS = 40


def caches() -> CanonicalKVCaches:
    tensors = [CanonicalKVCacheTensor(torch.zeros((BLOCKS, size), dtype=torch.int8), size) for size in PAGES]
    refs = [CanonicalKVCacheRef(index, size) for index, size in enumerate(PAGES)]
    return CanonicalKVCaches(tensors, [refs[:2], refs[2:]])


class Bench:
    def __init__(self, per_chunk: int = 1, chunks: int = 16) -> None:
        self.caches = caches()
        self.copies = BlockCopies(self.caches, per_chunk, chunks)
        self.number = 0

    def fill(self, seed: int) -> list[torch.Tensor]:
        """Random contents everywhere; returns a copy of them."""
        torch.manual_seed(seed)
        for one in self.caches.tensors:
            one.tensor.copy_(torch.randint(-128, 127, one.tensor.shape, dtype=torch.int8))
        return [one.tensor.clone() for one in self.caches.tensors]

    def move(self, stores: bool, blocks: list[list[int]], first: list[int], chunks: list[int]) -> Any:
        """Moves these blocks of the two groups, and waits."""
        cache = GPULoadStoreSpec([*chain(*blocks)], [len(one) for one in blocks], first)
        host = CPULoadStoreSpec(chunks)
        self.number += 1
        if stores:
            assert self.copies.submit_store(self.number, cache, host)
        else:
            assert self.copies.submit_load(self.number, host, cache)
        self.copies.wait({self.number})
        (result,) = self.copies.get_finished()
        assert (result.job_id, result.success) == (self.number, True)
        assert result.transfer_time is not None
        return result


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.copies.shutdown()


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        ([5], [9], [(5, 9, 1)]),
        ([5, 6, 7], [1, 2, 3], [(5, 1, 3)]),
        ([5, 6, 7], [1, 2, 4], [(5, 1, 2), (7, 4, 1)]),
        ([5, 7, 8], [1, 2, 3], [(5, 1, 1), (7, 2, 2)]),
        ([3, 2, 1], [1, 2, 3], [(3, 1, 1), (2, 2, 1), (1, 3, 1)]),
    ],
)
def test_blocks_that_follow_each_other_on_both_sides_are_one_run(source: list, target: list, found: list) -> None:
    assert runs(np.array(source), np.array(target)) == found


def test_blocks_of_every_group_come_back_to_where_they_are_wanted(bench: Bench) -> None:
    before = bench.fill(1)
    result = bench.move(True, [[3, 4, 9], [7, 20]], [0, 0], [2, 3, 0, 5, 6])
    assert result.transfer_size == 3 * (24 + 8) + 2 * 40
    between = bench.fill(2)
    bench.move(False, [[11, 12, 30], [1, 2]], [0, 0], [2, 3, 0, 5, 6])
    for place, (old, now, one) in enumerate(zip(before, between, bench.caches.tensors, strict=True)):
        pairs = {11: 3, 12: 4, 30: 9} if place < 2 else {1: 7, 2: 20}
        for block in range(BLOCKS):
            wanted = old[pairs[block]] if block in pairs else now[block]
            assert torch.equal(one.tensor[block], wanted), (place, block)


def test_a_part_of_a_chunk_comes_back() -> None:
    bench = Bench(per_chunk=4, chunks=8)
    before = bench.fill(1)
    bench.move(True, [[0, 1, 2, 3, 4, 5, 6, 7], []], [0, 0], [5, 2])
    bench.fill(2)
    # From the third block of the first chunk to the second one of the next.
    bench.move(False, [[20, 25, 21, 22], []], [2, 0], [5, 2])
    cache = bench.caches.tensors[0].tensor
    for target, source in zip((20, 25, 21, 22), (2, 3, 4, 5), strict=True):
        assert torch.equal(cache[target], before[0][source])
    bench.copies.shutdown()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_chunk", [1, 3])
def test_random_copies(seed: int, per_chunk: int) -> None:
    rng = random.Random(seed)
    bench = Bench(per_chunk, chunks=12)
    host: dict[int, list[torch.Tensor]] = {}
    for number in range(60):
        free = [chunk for chunk in range(12) if chunk not in host]
        if free and rng.random() < 0.6:
            contents = bench.fill(number)
            chunks = rng.sample(free, rng.randint(1, len(free)))
            blocks = rng.sample(range(BLOCKS), len(chunks) * per_chunk)
            bench.move(True, [blocks, []], [0, 0], chunks)
            for place, chunk in enumerate(chunks):
                own = blocks[place * per_chunk : (place + 1) * per_chunk]
                host[chunk] = [contents[0][own], contents[1][own]]
        elif host:
            chunks = rng.sample([*host], rng.randint(1, len(host)))
            blocks = rng.sample(range(BLOCKS), len(chunks) * per_chunk)
            bench.move(False, [blocks, []], [0, 0], chunks)
            for index in (0, 1):
                found = bench.caches.tensors[index].tensor[blocks]
                assert torch.equal(found, torch.cat([host[chunk][index] for chunk in chunks]))
            if rng.random() < 0.5:
                del host[chunks[0]]
    bench.copies.shutdown()


def test_what_requests_wait_for_is_copied_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    order, may_go = [], threading.Event()
    copy = BlockCopies._copy

    def slow(self: BlockCopies, job: Any) -> int:
        may_go.wait(20)
        order.append(job.number)
        return copy(self, job)

    monkeypatch.setattr(BlockCopies, "_copy", slow)
    cache, host = GPULoadStoreSpec([1], [1, 0], [0, 0]), CPULoadStoreSpec([1])
    for number in (1, 2):
        bench.copies.submit_store(number, cache, host)
    for number in (3, 4):
        bench.copies.submit_load(number, host, cache)
    bench.copies.submit_load(5, host, cache, expedited=True)
    may_go.set()
    bench.copies.wait({1, 2, 3, 4, 5})
    assert sorted(order) == [1, 2, 3, 4, 5]
    rest = [number for number in order if number != 1]
    assert rest in ([5, 3, 4, 2], [3, 4, 5, 2])
    assert rest == [5, 3, 4, 2]


def test_a_store_that_a_step_waits_for_does_not_wait_for_loads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All loads that are queued may take seconds, in which no stream would get a token."""
    order, waits = [], threading.Event()
    copy = BlockCopies._copy

    def slow(self: BlockCopies, job: Any) -> int:
        order.append(job.number)
        waits.wait(20)
        return copy(self, job)

    monkeypatch.setattr(BlockCopies, "_copy", slow)
    cache, host = GPULoadStoreSpec([1], [1, 0], [0, 0]), CPULoadStoreSpec([1])
    for number in (1, 2, 3, 4):
        bench.copies.submit_load(number, host, cache)
    for number in (5, 6):
        bench.copies.submit_store(number, cache, host)
    while not order:
        pass
    changed = bench.copies._changed
    wait_for = changed.wait_for
    monkeypatch.setattr(changed, "wait_for", lambda *given: (waits.set(), wait_for(*given))[1])
    bench.copies.wait({6, 3})
    assert order[:3] == [1, 3, 6]
    bench.copies.wait({1, 2, 3, 4, 5, 6})
    assert order[3:] == [2, 4, 5]


def test_a_step_waits_for_loads_and_not_for_long(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go = threading.Event()
    copy = BlockCopies._copy
    monkeypatch.setattr(BlockCopies, "_copy", lambda self, job: (may_go.wait(20), copy(self, job))[1])
    cache, host = GPULoadStoreSpec([1], [1, 0], [0, 0]), CPULoadStoreSpec([1])
    bench.copies.submit_load(1, host, cache)
    assert bench.copies.get_finished() == []
    may_go.set()
    bench.copies.LOADS_S = 20.0  # type: ignore[misc]
    (result,) = bench.copies.get_finished()
    assert result.job_id == 1


def test_an_error_while_copying_ends_the_engine_with_its_cause(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: BlockCopies, job: Any) -> int:
        raise MemoryError("no more pages")

    monkeypatch.setattr(BlockCopies, "_copy", broken)
    cache, host = GPULoadStoreSpec([1], [1, 0], [0, 0]), CPULoadStoreSpec([1])
    bench.copies.submit_store(1, cache, host)
    with pytest.raises(RuntimeError, match="copying KV blocks between the KV cache and host memory failed") as raised:
        bench.copies.wait({1})
    assert isinstance(raised.value.__cause__, MemoryError)
    with pytest.raises(RuntimeError, match="copying KV blocks"):
        bench.copies.get_finished()


def spec_config(size: int, canonical: bool = False) -> Any:
    return SimpleNamespace(
        extra_config={"cpu_bytes_to_use": size},
        groups=(SimpleNamespace(tokens_per_block=16),),
        cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=SimpleNamespace(world_size=1, rank=0),
        model=SimpleNamespace(max_model_len=4096),
        worker_kv_bytes_per_block=10_000,
        replicated_layout=False,
        canonical_layout=canonical,
        enable_kv_cache_events=False,
    )


def test_a_host_that_holds_no_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumpyOffloadingSpec.__mro__[1], "_uses_shared_region", lambda self: False)
    if hasattr(__import__("vllm.v1.kv_offload.cpu.spec", fromlist=["x"]), "CPUOffloadingInfo"):
        from vllm.v1.kv_offload.cpu import spec

        monkeypatch.setattr(spec.CPUOffloadingInfo, "from_config", lambda *arguments: None)
    with pytest.raises(ValueError, match="host memory of 5000 bytes has no room for a KV block of 12288 bytes"):
        NumpyOffloadingSpec(spec_config(5000))
    with pytest.raises(ValueError, match="'canonical_layout' needs a copy of blocks that CPUs do not have"):
        NumpyOffloadingSpec(spec_config(1 << 20, canonical=True))
    assert NumpyOffloadingSpec(spec_config(1 << 20)).num_chunks == (1 << 20) // 12288


def test_the_kv_cache_of_vllms_cpu_worker_comes_back_layer_by_layer(toy_model: Path) -> None:
    """Laid out and registered as vLLM's worker does it."""
    from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    given = transfer_options(1 / 64, "lru", on_cpu=True)
    config = VllmConfig(
        model_config=ModelConfig(model=str(toy_model), dtype="float32", max_model_len=256),
        cache_config=CacheConfig(block_size=32),
        kv_transfer_config=KVTransferConfig(**given),
    )
    config.cache_config.kv_cache_layout = "LBHNC"
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    layers = [f"model.layers.{number}.self_attn.attn" for number in range(3)]
    size = spec.page_size_bytes
    tensor = KVCacheTensor(size=3 * 20 * size, layers=layers, layer_stride=20 * size, block_stride=size)
    kv_cache_config = KVCacheConfig(20, [tensor], [KVCacheGroupSpec(layers, spec)])
    caches = allocate_kv_cache(kv_cache_config, torch.device("cpu"), KVCacheLayout.LBHNC)
    assert sorted(caches) == layers
    connector = OffloadingConnector(config, KVConnectorRole.WORKER, kv_cache_config)
    connector.register_kv_caches(caches)
    half = connector.connector_worker
    assert half is not None
    copies = half.worker
    assert isinstance(copies, BlockCopies)
    for one in caches.values():
        one.copy_(torch.randint(-100, 100, one.shape).to(one.dtype))
    before = {name: one.clone() for name, one in caches.items()}
    assert copies.submit_store(1, GPULoadStoreSpec([3, 4, 7], [3], [0]), CPULoadStoreSpec([5, 6, 2]))
    copies.wait({1})
    for one in caches.values():
        one.zero_()
    assert copies.submit_load(2, CPULoadStoreSpec([5, 6, 2]), GPULoadStoreSpec([9, 1, 10], [3], [0]))
    copies.wait({2})
    sizes = {result.job_id: result.transfer_size for result in copies.get_finished()}
    assert sizes == {1: 3 * 3 * size, 2: 3 * 3 * size}
    for name, one in caches.items():
        for block in range(one.shape[0]):
            source = {9: 3, 1: 4, 10: 7}.get(block)
            wanted = torch.zeros_like(one[block]) if source is None else before[name][source]
            assert torch.equal(one[block], wanted), (name, block)
    connector.shutdown()
