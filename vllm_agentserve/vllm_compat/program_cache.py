"""vLLM's seam for what makes room in host memory: the order by programs of `policy/hosting.py`.

The connector names this module as `cache_policy_module_path`; vLLM's own books, copies and counts of users stay as they are.
"""

from collections.abc import Collection, Iterable, Sequence
from time import perf_counter

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus

from vllm_agentserve.policy.hosting import Hosting

UNKNOWN = "unknown request"
"""Has the chunks that a request offers once more."""


def unknown(keys: Sequence[OffloadKey], known: Collection[OffloadKey]) -> Sequence[OffloadKey]:
    """Those of a context that are not among the known ones: nearly always its end, since contexts grow there, and make room from
    there. A gap is seen by the number of known ones, unless that of another end makes up for it."""
    end = len(keys)
    while end and keys[end - 1] not in known:
        end -= 1
    return keys[end:] if len(known) == end else [key for key in keys if key not in known]


class ProgramCachePolicy(CachePolicy):
    """Whole programs make room, those first that are not expected back, then the one that is expected last.

    Requests whose program nobody says are programs of one call.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.chunks: dict[OffloadKey, ChunkStatus] = {}
        self.hosting = Hosting()
        self.names: dict[str, str] = {}
        """Programs of requests, by their ids: set from outside."""
        self._storing: dict[OffloadKey, ReqContext] = {}
        """By chunk the request that missed it last, until that is over. vLLM says so once, and the chunk may be offered later:
        there was no room, or it was dropped while the request waited without a place."""

    def _name(self, request: ReqContext) -> str:
        return self.names.get(request.req_id) or f"request {request.req_id}"

    def _place(self, key: OffloadKey) -> tuple[str | None, int]:
        """Whose chunk is being stored, as far as that is known, and where it ends in that context."""
        request = self._storing.get(key)
        end = None if request is None else request.get_offload_key_position(key)
        return (None, 0) if request is None or end is None else (self._name(request), end)

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self.chunks.get(key)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        self._storing.update(dict.fromkeys(keys, req_context))

    def insert(self, key: OffloadKey, chunk: ChunkStatus, req_context: ReqContext | None = None) -> None:
        """`req_context` (vLLM 0.33): of the request that stores it."""
        self.chunks[key] = chunk
        if req_context is not None:
            self._storing[key] = req_context
        name, end = self._place(key)
        # At the latest when its request ends it is known whose it is.
        self.hosting.store(UNKNOWN if name is None else name, key, end)

    def remove(self, key: OffloadKey) -> None:
        del self.chunks[key]
        self.hosting.drop(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """What a request has used is said when it ends."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        name, end_of = self._name(req_context), req_context.get_offload_key_position
        known = self.hosting.context(name)
        for keys in key_groups:
            self.hosting.use(name, ((key, end_of(key) or 0) for key in unknown(keys, known)))
            # Whatever is shorter.
            mine = [*self._storing] if len(self._storing) < len(keys) else keys
            for key in mine:
                if self._storing.get(key) is req_context:
                    del self._storing[key]

    def evict(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        if not n:
            return []
        chunks = self.chunks
        asks = next((name for name, _ in map(self._place, protected) if name is not None), None)
        found = self.hosting.make_room(
            n, perf_counter(), lambda key: key not in protected and chunks[key].ref_cnt == 0, asks
        )
        return None if found is None else [(key, chunks.pop(key)) for key in found]

    def clear(self) -> None:
        self.chunks.clear()
        self._storing.clear()
        self.hosting.clear()

    def faults(self) -> list[str]:
        """What does not agree; O(chunks)."""
        found = self.hosting.faults()
        if len(self.hosting) != len(self.chunks) or not all(key in self.hosting for key in self.chunks):
            found.append(f"host memory has {len(self.chunks)} chunks, and programs have {len(self.hosting)}")
        return found
