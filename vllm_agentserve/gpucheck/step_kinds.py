"""The three kinds of steps whose throughput is measured, and the shares of the device it is measured on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

LAYERS = 4
"""Enough that their weights do not stay in a GPU's cache."""


@dataclass(frozen=True)
class StepKind:
    """One kind of step: `batch` sequences that compute `tokens` new tokens each, with `context` tokens before them."""

    name: str
    batch: int
    tokens: int
    context: int


STEP_KINDS = (
    StepKind("decode", 8, 1, 3000),
    StepKind("cold prefill", 1, 2048, 0),
    StepKind("resume prefill", 1, 96, 3000),
)
"""Lengths as in the workload `react`."""
SMALL_STEP_KINDS = (
    StepKind("decode", 4, 1, 300),
    StepKind("cold prefill", 1, 256, 0),
    StepKind("resume prefill", 1, 32, 300),
)


@dataclass(frozen=True)
class DeviceShare:
    """A part of the device.

    Args:
        units: multiprocessors, or cores.
        entered: a context in which work runs on them.
        wait: returns when what was launched in it is done.
    """

    units: int
    entered: Callable[[], AbstractContextManager[Any]]
    wait: Callable[[], None]
