"""The thread that launches in slices: what runs when, what is swapped, and how failures come back."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_agentserve.lanes.cuda.relay import Relay


class Box:
    """State of the process: one value."""

    def __init__(self) -> None:
        self.value = "mine"

    def take(self) -> str:
        return self.value

    def put(self, state: str) -> None:
        self.value = state


class Bench:
    """A relay with a clock that every part of the work moves on by a second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.box = Box()
        self.entered: list[int] = []
        self.log: list[str] = []
        self.relay = Relay(self.box, self.within, lambda: self.now)

    @contextmanager
    def within(self) -> Iterator[None]:
        self.entered.append(threading.get_ident())
        yield
        self.entered.append(0)

    def parts(self, count: int, fails: Exception | None = None) -> None:
        self.box.value = "theirs"
        for part in range(count):
            time.sleep(0.001)
            self.log.append(f"part {part} with {self.box.value}")
            self.now += 1.0
            self.relay.pause()
        if fails is not None:
            raise fails
        self.box.value = "over"


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.relay.close()
    assert made.entered[1:] == [0]
    assert made.entered[0] != threading.get_ident()


def test_work_runs_in_slices_and_only_while_it_is_waited_for(bench: Bench) -> None:
    bench.relay.begin(lambda: bench.parts(5))
    assert (bench.log, bench.relay.busy) == ([], True)
    assert not bench.relay.go_on(2.0)
    assert len(bench.log) == 2
    bench.log.append("between")
    assert not bench.relay.go_on(0.5)
    assert bench.relay.go_on()
    assert bench.log == [
        "part 0 with theirs",
        "part 1 with theirs",
        "between",
        "part 2 with theirs",
        "part 3 with theirs",
        "part 4 with theirs",
    ]
    assert not bench.relay.busy
    assert bench.relay.go_on(), "there is nothing to do"


def test_what_the_work_has_set_is_its_own(bench: Bench) -> None:
    bench.relay.begin(lambda: bench.parts(3))
    while not bench.relay.go_on(1.0):
        assert bench.box.value == "mine"
    assert bench.box.value == "mine"
    bench.box.value = "changed"
    bench.relay.begin(lambda: bench.log.append(bench.box.value))
    assert bench.relay.go_on()
    assert bench.log[-1] == "changed", "new work begins with the state of its caller"


def test_all_work_has_the_same_thread(bench: Bench) -> None:
    idents = []
    for _ in range(3):
        bench.relay.begin(lambda: idents.append(threading.get_ident()))
        assert bench.relay.go_on(0.0)
    assert set(idents) == {bench.entered[0]}


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_comes_back_once_and_ends_the_work(bench: Bench, failure: BaseException) -> None:
    bench.relay.begin(lambda: bench.parts(2, failure))  # type: ignore[arg-type]
    assert not bench.relay.go_on(1.0)
    with pytest.raises(type(failure)):
        bench.relay.go_on()
    assert (bench.relay.busy, bench.box.value) == (False, "mine")
    assert bench.relay.go_on()
    bench.relay.begin(lambda: bench.log.append("next"))
    assert bench.relay.go_on()
    assert bench.log[-1] == "next"


def test_one_piece_of_work_at_a_time(bench: Bench) -> None:
    bench.relay.begin(lambda: bench.parts(2))
    assert not bench.relay.go_on(1.0)
    with pytest.raises(RuntimeError, match="work that has not ended"):
        bench.relay.begin(lambda: None)
    with pytest.raises(RuntimeError, match="work that has not ended"):
        bench.relay.close()
    assert bench.relay.go_on()


def test_a_pause_outside_of_the_thread_does_nothing(bench: Bench) -> None:
    bench.relay.begin(lambda: bench.parts(3))
    assert not bench.relay.go_on(1.0)
    bench.parts(2)
    assert len(bench.log) == 3, "the caller is not stopped, though the slice is over"
    assert bench.relay.go_on()


def test_a_thread_that_cannot_be_prepared_is_said_at_once() -> None:
    @contextmanager
    def within() -> Iterator[None]:
        raise RuntimeError("no such device")
        yield

    with pytest.raises(RuntimeError, match="no such device"):
        Relay(Box(), within)


def test_an_interrupt_while_a_slice_runs_is_raised_when_the_other_thread_stands_still(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C in a notebook. The two threads never run at once, and what the work has set is not left to the caller."""
    acquire, calls = bench.relay._back.acquire, []

    def interrupted() -> bool:
        calls.append(bench.log[:])
        if len(calls) == 1:
            raise KeyboardInterrupt
        return acquire()

    monkeypatch.setattr(bench.relay._back, "acquire", interrupted)
    bench.relay.begin(lambda: bench.parts(50))
    with pytest.raises(KeyboardInterrupt):
        bench.relay.go_on()
    seen = len(bench.log)
    assert (bench.box.value, bench.relay.busy) == ("mine", True)
    assert seen < 50
    time.sleep(0.05)
    assert len(bench.log) == seen, "it stands still"
    assert bench.relay.go_on()
    assert len(bench.log) == 50
