"""The garbage collector beside what was imported before the tests."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A replay collects garbage first and thaws all objects at its end: the next one need not look at them again.

    Not for engines in this process, whose memory is given back when they are collected. To ask how many objects are frozen takes
    milliseconds, as they are counted.
    """
    unfreeze, thawed = gc.unfreeze, []

    def thaw() -> None:
        thawed.append(True)
        unfreeze()

    monkeypatch.setattr(gc, "unfreeze", thaw)
    yield
    if thawed:
        gc.freeze()
