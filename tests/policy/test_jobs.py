"""Jobs of a lane, cut into chunks: every token once, nobody starves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.policy.jobs import ChunkQueue, Job
from vllm_agentserve.policy.slots import (
    PATIENCE_CHUNKS,
)

# Routes


def job(name: str, tokens: int, start: int = 0, resume: bool = False) -> Job:
    return Job(name, list(range(tokens + 1)), ([0],), start, resume)


def test_chunks_cover_a_job_but_its_last_token() -> None:
    queue = ChunkQueue()
    queue.add(job("a", 600, start=90))
    chunks = [queue.take(256) for _ in range(2)]
    assert [(c.position, c.tokens, c.first, c.last) for c in chunks] == [
        (90, 256, True, False),
        (346, 254, False, True),
    ]
    assert queue.drop("a")
    assert not len(queue)
    with pytest.raises(LookupError, match="no job"):
        queue.take(256)


def test_a_resume_goes_between_the_chunks_of_a_cold_prompt() -> None:
    queue = ChunkQueue()
    queue.add(job("cold", 1000))
    order = [queue.take(256)]
    queue.add(job("resume", 300, start=100, resume=True))
    order.append(queue.take(256))
    queue.drop("resume")
    order.append(queue.take(256))
    assert [(chunk.job.request_id, chunk.position, chunk.first) for chunk in order] == [
        ("cold", 0, True),
        ("resume", 100, True),
        ("cold", 256, False),
    ]


def test_a_job_that_never_ran_needs_no_clean_up() -> None:
    queue = ChunkQueue()
    queue.add(job("a", 600))
    assert "a" in queue
    assert not queue.drop("a")
    assert "a" not in queue


@given(st.lists(st.tuples(st.integers(1, 2000), st.booleans()), min_size=1, max_size=8), st.integers(16, 512))
def test_every_token_of_every_job_is_computed_once_and_nobody_starves(jobs: list[tuple[int, bool]], chunk: int) -> None:
    """Short resumes keep coming; a cold job still gets every `PATIENCE_CHUNKS`th chunk at least."""
    queue = ChunkQueue()
    for number, (tokens, resume) in enumerate(jobs):
        queue.add(job(f"j{number}", tokens, resume=resume))
    queue.add(job("cold", 3 * chunk))
    done: dict[str, int] = {}
    waited, extra = 0, 0
    while len(queue):
        if extra < 300:
            queue.add(job(f"extra-{extra}", 1, resume=True))
            extra += 1
        taken = queue.take(chunk)
        name = taken.job.request_id
        assert taken.position == done.get(name, 0)
        done[name] = taken.position + taken.tokens
        waited = 0 if name == "cold" else waited + ("cold" in queue)
        assert waited <= PATIENCE_CHUNKS + len(jobs) + 1
        if taken.last:
            queue.drop(name)
    assert {f"j{number}": tokens for number, (tokens, _) in enumerate(jobs)}.items() <= done.items()
    assert done["cold"] == 3 * chunk
