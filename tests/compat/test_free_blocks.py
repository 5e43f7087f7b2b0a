"""vLLM's block pool with our queue of free blocks: the same while nothing is kept, and nothing is lost or refused otherwise."""

from time import perf_counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id

from vllm_agentserve.policy.retention import Retention
from vllm_agentserve.vllm_compat.free_blocks import RetainingQueue

TOKENS = 16


class Pool:
    """A block pool under sequences that are computed and freed; blocks are known by the text up to them."""

    def __init__(self, blocks: int, retains: bool, share: float = 0.75) -> None:
        self.pool: Any = BlockPool(blocks + 1, enable_caching=True, hash_block_size=TOKENS)
        self.retention = Retention(blocks, share=share)
        if retains:
            self.pool.free_block_queue = RetainingQueue(self.pool.free_block_queue, TOKENS, self.retention)

    @property
    def ledger(self) -> Any:
        return self.pool.free_block_queue.ledger

    def found(self, text: str) -> list[KVCacheBlock]:
        blocks = []
        for end in range(1, len(text) + 1):
            cached = self.pool.get_cached_block(text[:end].encode(), [0])
            if not cached:
                break
            blocks += cached
        return blocks

    def compute(self, text: str) -> list[KVCacheBlock] | None:
        """The blocks of a sequence, one more than it fills; None where they cannot be had."""
        found = self.found(text)
        needed = len(text) + 1 - len(found) + sum(not block.ref_cnt for block in found)
        if needed > self.pool.get_num_free_blocks():
            return None
        self.pool.touch(found)
        new = self.pool.get_new_blocks(len(text) + 1 - len(found))
        for index, block in enumerate(new[:-1]):
            end = len(found) + index + 1
            key = make_block_hash_with_group_id(text[:end].encode(), 0)
            self.pool._insert_block_hash(key, block, num_tokens=end * TOKENS)
        return [*found, *new]

    def free(self, blocks: list[KVCacheBlock]) -> None:
        self.pool.free_blocks(reversed(blocks))

    def keep(self, name: str, blocks: list[KVCacheBlock]) -> None:
        """As if the program were sure to come back."""
        context = [block for block in blocks if block.block_hash is not None]
        own = self.ledger.own(name, context)
        keeps, gone = self.retention.end(name, 0.0, own)
        for other in gone:
            self.ledger.give_up(other)
        if keeps and context:
            self.ledger.keep(name, context)
        else:
            self.ledger.give_up(name)
            self.retention.release(name)

    def kept(self) -> dict[str, list[int]]:
        return {name: [block.block_id for block in segment] for name, segment in self.ledger.segments.items()}

    def faults(self) -> list[str]:
        free = self.pool.free_block_queue.get_all_free_blocks()
        found: list[str] = self.ledger.faults() + self.retention.faults()
        if len(free) != self.pool.get_num_free_blocks():
            found.append(f"{len(free)} blocks are free, and {self.pool.get_num_free_blocks()} are counted")
        if sorted(block.block_id for block in free) != [
            block.block_id for block in self.pool.blocks if not block.ref_cnt and not block.is_null
        ]:
            found.append("a block is lost, or free twice")
        if list(self.ledger.segments) != list(self.retention._kept):
            found.append(f"{list(self.retention._kept)} are kept, and {list(self.ledger.segments)} have blocks")
        counted = {block.block_id for segment in self.ledger.segments.values() for block in segment.context}
        if self.retention.blocks < len(counted):
            found.append(f"{self.retention.blocks} blocks are counted as kept, and {len(counted)} are")
        return found


def sure(pool: Pool) -> Pool:
    """Programs were seen to come back."""
    for _ in range(4):
        pool.retention.returns.returned((True, 1), None, 1.0, False)
    return pool


def run(pool: Pool, name: str, text: str, keep: bool = True) -> None:
    blocks = pool.compute(text)
    assert blocks is not None
    pool.retention.arrive(name, 0.0)
    if keep:
        pool.keep(name, blocks)
    pool.free(blocks)
    assert pool.faults() == []


def test_kept_blocks_outlive_any_number_of_others() -> None:
    pool = sure(Pool(32, retains=True))
    run(pool, "a", "system, a")
    kept = [block.block_id for block in pool.found("system, a")]
    for number in range(20):
        run(pool, f"one-shot {number}", f"{number:<10}", keep=False)
    assert [block.block_id for block in pool.found("system, a")] == kept
    assert pool.ledger.broken == 0


def test_kept_blocks_are_handed_out_last_the_end_of_a_context_first() -> None:
    pool = sure(Pool(32, retains=True))
    run(pool, "a", "system, a")
    everything = pool.pool.get_new_blocks(28)
    assert len(pool.found("system, a")) == 4
    assert pool.ledger.broken == 5
    assert pool.retention.blocks == 4
    everything += pool.pool.get_new_blocks(4)
    assert pool.retention.blocks == 0
    assert "a" not in pool.retention
    pool.pool.free_blocks(everything)
    assert pool.faults() == []


def test_what_two_programs_begin_with_counts_once_and_stays_while_one_is_kept() -> None:
    pool = sure(Pool(40, retains=True))
    run(pool, "a", "system, a")
    run(pool, "b", "system, bb")
    assert pool.retention.blocks == 9 + 2
    run(pool, "c", "system", keep=False)
    pool.retention.release("a")
    pool.ledger.give_up("a")
    assert pool.faults() == []
    assert pool.retention.blocks == 10
    for number in range(12):
        run(pool, f"one-shot {number}", f"{number:<10}", keep=False)
    assert len(pool.found("system, bb")) == 10
    assert len(pool.found("system, a")) == 8


def test_a_program_whose_history_was_edited_keeps_its_new_one() -> None:
    pool = sure(Pool(40, retains=True))
    run(pool, "a", "system, history")
    run(pool, "b", "system, history of b")
    run(pool, "a", "system, edited")
    assert pool.retention.blocks == len("system, edited") + len("history of b")
    pool.retention.release("b")
    pool.ledger.give_up("b")
    assert pool.faults() == []
    assert pool.retention.blocks == len("system, edited")


def test_those_that_walk_the_free_blocks_see_all_of_them() -> None:
    pool = sure(Pool(24, retains=True))
    run(pool, "a", "aaaa")
    run(pool, "b", "bbbb")
    queue = pool.pool.free_block_queue
    order = queue.get_all_free_blocks()
    assert list(queue.iter_blocks_after(None)) == order
    for index, block in enumerate(order):
        assert list(queue.iter_blocks_after(block)) == order[index + 1 :]
    assert [block.block_id for block in order[-8:]] == pool.kept()["a"] + pool.kept()["b"]


TEXTS = st.text("ab", min_size=1, max_size=9)


STEP = st.tuples(st.sampled_from("rrrfffFdpx"), st.sampled_from("ABCD"), TEXTS)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=40), st.sampled_from([0.3, 0.75, 1.0]))
def test_nothing_is_lost_and_nothing_refused(steps: list[tuple[str, str, str]], share: float) -> None:
    """Whatever fits into the free blocks is allocated, kept or not, and what is handed out is nobody else's."""
    ours = sure(Pool(24, retains=True, share=share))
    running: list[tuple[str, list[KVCacheBlock]]] = []
    for kind, name, text in steps:
        if kind == "r":
            free = ours.pool.get_num_free_blocks()
            found = ours.found(text)
            needed = len(text) + 1 - len(found) + sum(not block.ref_cnt for block in found)
            blocks = ours.compute(text)
            assert (blocks is not None) == (needed <= free)
            if blocks is not None:
                ours.retention.arrive(name, 0.0)
                running.append((name, blocks))
                assert ours.pool.get_num_free_blocks() == free - needed
                assert all(block.ref_cnt for block in blocks)
        elif kind in "fF" and running:
            ended, blocks = running.pop(0 if kind == "f" else -1)
            ours.keep(ended, blocks)
            ours.free(blocks)
        elif kind == "d" and running:
            # Aborted or preempted.
            aborted, blocks = running.pop()
            ours.retention.abort(aborted, 0.0)
            ours.free(blocks)
        elif kind == "p":
            for gone in ours.retention.expire(float(len(text))):
                ours.ledger.give_up(gone)
        elif kind == "x" and name in ours.ledger.segments:
            ours.retention.release(name)
            ours.ledger.give_up(name)
        assert ours.faults() == []
    for _, blocks in running:
        ours.free(blocks)
    assert len(ours.pool.get_new_blocks(24)) == 24
    assert ours.ledger.segments == {}


@settings(max_examples=100, deadline=None)
@given(st.lists(STEP, max_size=40))
def test_with_nothing_kept_the_queue_is_vllms(steps: list[tuple[str, str, str]]) -> None:
    pools = Pool(24, retains=False), Pool(24, retains=True)
    running: list[list[list[KVCacheBlock]]] = []
    for kind, _, text in steps:
        if kind == "r":
            made = [pool.compute(text) for pool in pools]
            ids = [None if blocks is None else [block.block_id for block in blocks] for blocks in made]
            assert ids[0] == ids[1]
            if made[0] is not None:
                running.append([blocks for blocks in made if blocks is not None])
        elif running:
            for pool, blocks in zip(pools, running.pop(0 if kind == "f" else -1), strict=True):
                pool.free(blocks)
        orders = [[block.block_id for block in pool.pool.free_block_queue.get_all_free_blocks()] for pool in pools]
        assert orders[0] == orders[1]


def test_a_long_context_is_kept_at_little_more_than_it_takes_to_free_it() -> None:
    """8,900 blocks beside 60 programs: what is added stays far below what vLLM itself does with each block."""
    pool = sure(Pool(40_000, retains=True))
    for number in range(60):
        run(pool, f"program {number}", chr(200 + number) * 40)
    took, added = [], []
    context = pool.pool.get_new_blocks(8_900)
    for index, block in enumerate(context):
        block.set_block_hash(make_block_hash_with_group_id(str(index).encode(), 0), num_tokens=(index + 1) * TOKENS)
    pool.retention.arrive("long", 0.0)
    for _ in range(7):
        before = perf_counter()
        own = pool.ledger.own("long", context)
        pool.retention.end("long", 0.0, own)
        pool.ledger.keep("long", list(context))
        added.append(perf_counter() - before)
        before = perf_counter()
        pool.free(context)
        took.append(perf_counter() - before)
        pool.pool.touch(context)
    assert min(added) < 0.3 * min(took)
