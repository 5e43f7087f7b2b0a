"""Work of a benchmark for experiments that start no server."""

from vllm_agentserve.bench.sessions import Session, Turn


def small(number: int) -> list[Session]:
    return [Session("a", "a", (Turn((1,) * 50, 4), Turn((2,) * 10, 4)))]
