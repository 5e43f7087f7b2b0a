"""What makes room in host memory, in the simulator: vLLM's LRU and ARC, and ours by programs.

A call offers its blocks as they are filled, once, as vLLM's OffloadingConnector does: what was found in the KV cache with the
first of them, but not what comes before blocks that were restored.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from vllm_agentserve.policy.hosting import Hosting
from vllm_agentserve.simulator.host_blocks import Filling, HostBlocks, HostLink

Key = Hashable


class LruBlocks(HostBlocks):
    """vLLM's `lru`: a block is used when it is stored, and when a call that had it ends."""

    def fill(self, call: Filling, keys: Sequence[Key], first: int, now_s: float) -> None:
        if not self._capacity:
            return
        offered = keys[call.offered :]
        new = [key for key in offered if key not in self._copies]
        missing = len(new) - (self._capacity - len(self))
        if missing > 0 and not self._evict(missing, {*offered}):
            return
        call.offered = len(keys)
        for key in new:
            self._copies[key] = None

    def _evict(self, number: int, protected: set[Key]) -> bool:
        found = [key for key in self._copies if key not in protected][:number]
        if len(found) < number:
            return False
        for key in found:
            del self._copies[key]
        return True

    def end(self, call: Filling, keys: Sequence[Key], now_s: float, last: bool) -> None:
        self.fill(call, keys, len(keys), now_s)
        for key in reversed(keys[call.seen :]):
            if key in self._copies:
                self._copies.move_to_end(key)


class ArcBlocks(HostBlocks):
    """vLLM's `arc`: blocks that were stored and not used again, and those that were; how many of each is learned from those that
    were wanted after they had gone."""

    def __init__(self, link: HostLink, tokens: int) -> None:
        super().__init__(link, tokens)
        self._once, self._again = OrderedDict[Key, None](), OrderedDict[Key, None]()
        self._gone_once, self._gone_again = OrderedDict[Key, None](), OrderedDict[Key, None]()
        self._target = 0.0

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def __contains__(self, key: Key) -> bool:
        return key in self._once or key in self._again

    def fill(self, call: Filling, keys: Sequence[Key], first: int, now_s: float) -> None:
        if not self._capacity:
            return
        offered = keys[call.offered :]
        new = [key for key in offered if key not in self]
        for key in reversed(new):
            if key not in call.missed:
                self._adapt(key)
        call.missed.update(new)
        missing = len(new) - (self._capacity - len(self))
        if missing > 0 and not self._evict(missing, {*offered}):
            return
        call.offered = len(keys)
        for key in new:
            self._once[key] = None
            self._gone_once.pop(key, None)
            self._gone_again.pop(key, None)
            call.stored.add(key)

    def _adapt(self, key: Key) -> None:
        once, again = self._gone_once, self._gone_again
        if key in once:
            self._target = min(self._target + max(1, len(again) / len(once)), self._capacity)
            once.move_to_end(key)
        elif key in again:
            self._target = max(self._target - max(1, len(once) / len(again)), 0)
            again.move_to_end(key)

    def _evict(self, number: int, protected: set[Key]) -> bool:
        once = [key for key in self._once if key not in protected]
        again = [key for key in self._again if key not in protected]
        if len(once) + len(again) < number:
            return False
        # In the order of vLLM, from the front of each.
        once.reverse()
        again.reverse()
        for _ in range(number):
            if once and (len(self._once) >= int(self._target) or not again):
                key = once.pop()
                del self._once[key]
                self._gone_once[key] = None
            else:
                key = again.pop()
                del self._again[key]
                self._gone_again[key] = None
        for gone in (self._gone_once, self._gone_again):
            while len(gone) > self._capacity:
                gone.popitem(last=False)
        return True

    def end(self, call: Filling, keys: Sequence[Key], now_s: float, last: bool) -> None:
        self.fill(call, keys, len(keys), now_s)
        for key in reversed(keys[call.seen :]):
            if key in call.stored:
                for copies in (self._once, self._again):
                    if key in copies:
                        copies.move_to_end(key)
            elif key in self:
                self._once.pop(key, None)
                self._again[key] = None
                self._again.move_to_end(key)


class ProgramBlocks(HostBlocks):
    """Ours: the program that is expected back last goes first; see `policy/hosting.py`."""

    def __init__(self, link: HostLink, tokens: int) -> None:
        super().__init__(link, tokens)
        self.hosting = Hosting()

    def __len__(self) -> int:
        return len(self.hosting)

    def __contains__(self, key: Key) -> bool:
        return key in self.hosting

    def arrive(self, call: Filling, now_s: float) -> None:
        self.hosting.arrive(call.program, now_s, named=call.named)

    def admit(self, call: Filling) -> None:
        self.hosting.admit(call.program)

    def fill(self, call: Filling, keys: Sequence[Key], first: int, now_s: float) -> None:
        if not self._capacity:
            return
        offered = keys[call.offered :]
        new = [(key, place) for place, key in enumerate(offered, call.offered) if key not in self.hosting]
        missing = len(new) - (self._capacity - len(self))
        stays = {*offered}
        if missing > 0 and self.hosting.make_room(missing, now_s, lambda key: key not in stays, call.program) is None:
            return
        call.offered = len(keys)
        for key, place in new:
            self.hosting.store(call.program, key, place)

    def end(self, call: Filling, keys: Sequence[Key], now_s: float, last: bool) -> None:
        self.hosting.end(call.program, now_s, last=last)
        self.fill(call, keys, len(keys), now_s)
        self.hosting.use(call.program, ((key, place) for place, key in enumerate(keys[call.seen :], call.seen)))


POLICIES: dict[str, Callable[[HostLink, int], HostBlocks]] = {
    "lru": LruBlocks,
    "arc": ArcBlocks,
    "program": ProgramBlocks,
}
