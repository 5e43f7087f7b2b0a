"""vLLM's queue of free KV blocks with a part that is handed out last: blocks kept for programs that come back.

Retired by: free blocks in the order that a scheduler class asks for, as in vLLM's RFC 52113.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from vllm_agentserve.kv.ledger import End, Keeper, Ledger

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


class RetainingQueue(FreeKVCacheBlockQueue):
    """vLLM's, and while nothing is kept exactly that. Kept blocks count as free: what could be allocated if none was kept can be
    allocated.

    Args:
        queue: whose place it takes, with the blocks that are in it.
        block_tokens: of a KV block.
        keeper: decides who is kept.
    """

    def __init__(self, queue: FreeKVCacheBlockQueue, block_tokens: int, keeper: Keeper) -> None:
        self.num_free_blocks = queue.num_free_blocks
        self.fake_free_list_head = queue.fake_free_list_head
        self.fake_free_list_tail = queue.fake_free_list_tail
        self.ledger = Ledger(block_tokens, keeper, self.fake_free_list_tail)

    def popleft(self) -> KVCacheBlock:
        if self.fake_free_list_head.next_free_block is not self.fake_free_list_tail or not self.num_free_blocks:
            return super().popleft()
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        if not self.ledger.segments:
            return super().popleft_n(n)
        assert self.num_free_blocks >= n
        head, tail = self.fake_free_list_head, self.fake_free_list_tail
        found: list[KVCacheBlock] = []
        block = head.next_free_block
        for _ in range(n):
            if block is tail:
                break
            assert block is not None
            found.append(block)
            following = block.next_free_block
            block.prev_free_block = block.next_free_block = None
            block = following
        assert block is not None
        head.next_free_block, block.prev_free_block = block, head
        if len(found) < n:
            found += self.ledger.hand_out(n - len(found))
        self.num_free_blocks -= n
        return found

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        if not blocks or not self.ledger.segments:
            super().append_n(blocks)
            return
        others = self.ledger.place(blocks)
        self.num_free_blocks += len(blocks) - len(others)
        super().append_n(others)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        return [*super().get_all_free_blocks(), *self.ledger.after(self.fake_free_list_tail)]

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        block = self.fake_free_list_head.next_free_block if cursor is None else cursor.next_free_block
        while block is not None and block is not self.fake_free_list_tail and not isinstance(block, End):
            yield block
            block = block.next_free_block
        if block is not None:
            yield from self.ledger.after(block)


def retention_obstacle(scheduler: "Scheduler") -> str | None:
    """Why the KV blocks of programs cannot be kept in this engine; None if they can."""
    if not scheduler.cache_config.enable_prefix_caching:
        return "prefix caching is off"
    if len(scheduler.kv_cache_config.kv_cache_groups) != 1:
        return "the layers of this model differ in what they keep in the KV cache"
    pool = scheduler.kv_cache_manager.block_pool
    if type(pool.free_block_queue) is not FreeKVCacheBlockQueue:
        return "another part has replaced vLLM's queue of free KV blocks"
    return None


def pool_blocks(scheduler: "Scheduler") -> int:
    """KV blocks that can be handed out; one is vLLM's own."""
    return int(scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1)


def retain_blocks(scheduler: "Scheduler", keeper: Keeper) -> Ledger:
    """Puts the queue in the place of vLLM's."""
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    pool = scheduler.kv_cache_manager.block_pool
    queue = RetainingQueue(pool.free_block_queue, int(manager.block_size), keeper)
    pool.free_block_queue = queue
    return queue.ledger


def blocks_of(scheduler: "Scheduler", request: "Request") -> Sequence[KVCacheBlock]:
    """The blocks that a request has, those that it shares with others included."""
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    return manager.req_to_blocks.get(request.request_id, ())


def cached_blocks(scheduler: "Scheduler", request: "Request") -> list[KVCacheBlock]:
    """The blocks of a request that can be found again, from its first token on."""
    blocks = list(blocks_of(scheduler, request))
    while blocks and blocks[-1].block_hash is None:
        blocks.pop()
    return blocks
