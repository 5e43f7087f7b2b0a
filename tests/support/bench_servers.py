"""Servers and work of a benchmark that are there already, for experiments that start none."""

from vllm_agentserve.bench.sessions import Session, Turn


def small(number: int) -> list[Session]:
    return [Session("a", "a", (Turn((1,) * 50, 4), Turn((2,) * 10, 4)))]


class Borrowed:
    """Stands for a server of ours: one that runs already."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> "Borrowed":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def alive(self) -> bool:
        return True

    def tail(self) -> str:
        return ""
