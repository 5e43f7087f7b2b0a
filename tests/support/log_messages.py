"""What our logger said, whatever vLLM's logging is set to."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "vllm.agentserve"


class _Collected(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def log_messages(level: int = logging.WARNING) -> Iterator[list[str]]:
    """The messages of our logger from `level` up, each once.

    `caplog` sees them twice where the logger, or one above it, passes records on and has been given the handler as well.
    """
    logger = logging.getLogger(LOGGER)
    collected = _Collected(level)
    before = logger.level
    logger.addHandler(collected)
    logger.setLevel(level)
    try:
        yield collected.messages
    finally:
        logger.setLevel(before)
        logger.removeHandler(collected)
