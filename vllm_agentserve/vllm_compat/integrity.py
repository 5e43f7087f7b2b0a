"""Whether vLLM's records of KV blocks agree: nothing leaked, nothing freed twice, nothing cached under a wrong hash."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


def block_faults(scheduler: "Scheduler") -> list[str]:
    """What is wrong with the blocks of a scheduler between two steps; O(blocks).

    A block is held as often as requests have it in their tables, or is free exactly once; the null block belongs to none.
    A request that has ended holds nothing.
    """
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    held: Counter[int] = Counter()
    found = []
    for one in manager.coordinator.single_type_managers:
        for request_id, blocks in one.req_to_blocks.items():
            if blocks and request_id not in scheduler.requests:
                found.append(f"{len(blocks)} KV blocks are held by the request {request_id!r}, which is gone")
            held.update(block.block_id for block in blocks if not block.is_null)
    for _, blocks in scheduler.deferred_frees:
        held.update(block.block_id for block in blocks if not block.is_null)
    free = Counter(block.block_id for block in pool.free_block_queue.get_all_free_blocks())
    if pool.get_num_free_blocks() != free.total():
        found.append(f"the pool counts {pool.get_num_free_blocks()} free KV blocks and lists {free.total()}")
    for block in pool.blocks:
        if block.is_null:
            continue
        number = block.block_id
        holders, listed = held.get(number, 0), free.get(number, 0)
        if block.ref_cnt != holders:
            found.append(f"KV block {number} is counted as held {block.ref_cnt} times, and is held {holders} times")
        if listed != (0 if holders else 1):
            found.append(f"KV block {number} is held {holders} times, and is {listed} times among the free ones")
        if block.block_hash is not None and not pool.cached_block_hash_to_block.contain(block.block_hash, number):
            found.append(f"KV block {number} has the hash of a prefix, and is not in the prefix cache")
    return found


def writing_faults(scheduler: "Scheduler", starts: Mapping[str, int]) -> list[str]:
    """What is wrong with blocks that are written beside the steps: each belongs to its writer and is not in the prefix cache.

    Args:
        scheduler: between two steps.
        starts: by request that is being written, the first token that is; see `policy/fence.py`.
    """
    found = []
    for one in scheduler.kv_cache_manager.coordinator.single_type_managers:
        for request_id, start in starts.items():
            for block in one.req_to_blocks.get(request_id, [])[start // one.block_size :]:
                if block.is_null:
                    continue
                if block.ref_cnt != 1:
                    found.append(
                        f"KV block {block.block_id} is written for {request_id!r}, and is held {block.ref_cnt} times"
                    )
                if block.block_hash is not None:
                    found.append(f"KV block {block.block_id} is written for {request_id!r}, and is in the prefix cache")
    return found
