"""Space: a share of the KV cache that is reserved for critical calls while there are any.

Clients say which calls are critical (`agent_critical`): those that somebody's result waits for, the longest chain of an
application. They go before the others of their class and level, and the contexts of their programs are kept between calls
(`policy/retention.py`). Kept blocks and those that critical calls have count towards the reserve, also while a context comes
back from host memory or is computed by a lane; others that wait may have all blocks but the rest of it. Nobody is kept from
blocks for longer than a call may be overtaken.

The share follows how much of the KV cache is in use or kept. After Tokencake (arXiv 2510.18586), with its figures.
"""

from math import inf

LEAST, MOST = 0.05, 0.30
"""Of the KV cache, what is reserved."""
STEP = 0.05
"""By so much the share changes at once."""
HIGH, LOW = 0.75, 0.40
"""It grows where more of the cache is in use, and shrinks where less is."""
EVERY_S = 1.0
"""Time between two changes."""


class Space:
    """Args:
    pool_blocks: size of the KV cache.
    most: largest share that is reserved; 0 for none.
    """

    def __init__(self, pool_blocks: int, most: float = MOST) -> None:
        self._pool_blocks = pool_blocks
        self.most = most
        self.share = min(LEAST, most)
        self._changed_s = -inf

    def adapt(self, now_s: float, used_blocks: int) -> None:
        """Follows the blocks that are in use by running calls, or kept for critical programs.

        Args:
            now_s: in seconds of any clock.
        """
        if now_s - self._changed_s < EVERY_S:
            return
        self._changed_s = now_s
        use = used_blocks / max(self._pool_blocks, 1)
        if use > HIGH:
            self.share = min(self.share + STEP, self.most)
        elif use < LOW:
            self.share = max(self.share - STEP, min(LEAST, self.most))

    def reserved(self, critical_blocks: int) -> int:
        """Free blocks that other calls may not have.

        Args:
            critical_blocks: that critical calls have which run now.
        """
        return max(int(self.share * self._pool_blocks) - critical_blocks, 0)
