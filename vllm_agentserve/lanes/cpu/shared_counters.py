"""A few numbers in shared memory, by which the worker and its lane's process tell each other what no message has to."""

from vllm_agentserve.lanes.cpu.memory import SharedMemory

NAMES = ("decoding", "beat", "slot", "tokens", "seconds")


class SharedCounters:
    """Every number is written by one side only, and read by the other whenever it likes.

    Args:
        descriptor: of an inherited one; None makes a new one.

    `decoding`: 1 while the decode lane has work, between its steps too, else 0; `beat`: when the lane last began a chunk, in
    monotonic seconds; `slot`: how the device is divided; `tokens` and `seconds`: what the lane has computed beside decodes, and
    the time that took.
    """

    BYTES = 8 * len(NAMES)

    def __init__(self, descriptor: int | None = None) -> None:
        self._memory = SharedMemory(self.BYTES, descriptor)
        # No tensor: one that is made inside a step could not be written outside of one.
        self._numbers = self._memory.numbers()

    @property
    def descriptor(self) -> int:
        return self._memory.descriptor

    def close(self) -> None:
        self._memory.close()

    def __getitem__(self, name: str) -> float:
        return self._numbers[NAMES.index(name)]

    def __setitem__(self, name: str, value: float) -> None:
        self._numbers[NAMES.index(name)] = value
