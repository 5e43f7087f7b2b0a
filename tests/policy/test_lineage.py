"""Which prompts belong together when nobody says so: the rule on hand-made contexts, and on drawn agents without hints."""

from collections import Counter
from itertools import combinations

import pytest

from tests.support.sequences import BLOCK, hashes, tokens_of
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.sessions import Session, pinned_token
from vllm_agentserve.bench.workloads import find_workload
from vllm_agentserve.policy.attribution import WEAK_OUTPUT_TOKENS, Lineage

SYSTEM = tokens_of("system", 50)


class Known:
    """A lineage that is told of finished requests by prompt and answer."""

    def __init__(self, capacity: int = 1000) -> None:
        self.lineage = Lineage(BLOCK, capacity)

    def finished(self, program: str, prompt: list[int], answer: list[int]) -> list[int]:
        every = prompt + answer
        self.lineage.remember(program, 1.0, hashes(every), every, len(prompt))
        return every

    def program_of(self, prompt: list[int]) -> str | None:
        found = self.lineage.find(hashes(prompt), prompt)
        return None if found is None else found.program


@pytest.fixture
def known() -> Known:
    return Known()


def test_the_next_turn_continues(known: Known) -> None:
    context = known.finished("a", SYSTEM + tokens_of("task", 40), tokens_of("answer", 10))
    assert known.program_of([*context, *tokens_of("tool", 30)]) == "a"


def test_a_shared_system_prompt_joins_nobody(known: Known) -> None:
    known.finished("a", SYSTEM + tokens_of("task a", 40), tokens_of("answer a", 10))
    assert known.program_of(SYSTEM + tokens_of("task b", 90)) is None


@pytest.mark.parametrize("differs_at", [0, 20, 89, 93])
def test_one_other_token_is_another_program(known: Known, differs_at: int) -> None:
    """Wherever it is up to the fourth token of the answer, the last block's tail included."""
    context = known.finished("a", SYSTEM + tokens_of("task", 40), tokens_of("answer", 10))
    prompt = [*context, *tokens_of("tool", 30)]
    prompt[differs_at] += 1
    assert known.program_of(prompt) is None


def test_an_answer_written_with_other_tokens_still_continues(known: Known) -> None:
    prompt, answer = SYSTEM + tokens_of("task", 40), tokens_of("answer", 30)
    known.finished("a", prompt, answer)
    rewritten = [*answer[:WEAK_OUTPUT_TOKENS], *tokens_of("other words", 20)]
    assert known.program_of([*prompt, *rewritten, *tokens_of("tool", 10)]) == "a"


def test_a_bare_system_prompt_becomes_nobodys_parent(known: Known) -> None:
    known.finished("warm-up", SYSTEM, tokens_of("hello", 8))
    assert known.program_of(SYSTEM + tokens_of("task", 60)) is None


def test_forks_stay_together(known: Known) -> None:
    context = known.finished("a", SYSTEM + tokens_of("task", 40), tokens_of("answer", 10))
    assert [known.program_of([*context, *tokens_of(branch, 30)]) for branch in "xyz"] == ["a"] * 3


def test_an_edited_history_begins_anew(known: Known) -> None:
    first = known.finished("a", SYSTEM + tokens_of("task", 40), tokens_of("answer", 30))
    known.finished("a", first + tokens_of("tool", 30), tokens_of("answer 2", 10))
    trimmed = SYSTEM + tokens_of("summary", 20) + first[60:]
    assert known.program_of(trimmed) is None


def test_identical_contexts_are_continued_in_turns(known: Known) -> None:
    for program in "ab":
        context = known.finished(program, SYSTEM + tokens_of("task", 40), tokens_of("answer", 10))
    continued = [known.program_of([*context, *tokens_of(f"tool {n}", 30)]) for n in range(4)]
    assert continued == ["a", "b", "a", "b"]


def test_the_longest_sequence_wins(known: Known) -> None:
    first = known.finished("a", SYSTEM + tokens_of("task", 40), tokens_of("answer", 10))
    second = known.finished("b", first + tokens_of("tool", 40), tokens_of("answer 2", 10))
    assert known.program_of([*second, *tokens_of("tool 2", 40)]) == "b"


def test_the_same_prompt_again_continues_nothing(known: Known) -> None:
    prompt = SYSTEM + tokens_of("task", 40)
    known.finished("a", prompt, tokens_of("answer", 10))
    assert known.program_of(prompt) is None


def test_what_has_no_answer_or_no_block_is_not_remembered(known: Known) -> None:
    known.finished("a", SYSTEM, [])
    known.finished("b", [1, 2, 3], [4, 5])
    assert len(known.lineage) == 0


def test_the_oldest_are_forgotten() -> None:
    known = Known(capacity=4)
    contexts = [known.finished(f"p{n}", tokens_of(f"task {n}", 40), tokens_of(f"answer {n}", 10)) for n in range(5)]
    assert len(known.lineage) <= 4
    assert known.program_of([*contexts[0], *SYSTEM]) is None
    assert known.program_of([*contexts[4], *SYSTEM]) == "p4"


def test_the_same_answer_again_and_again_is_remembered_so_often_and_no_more() -> None:
    known = Known(capacity=10_000)
    for n in range(300):
        context = known.finished(f"p{n}", SYSTEM + tokens_of("task", 40), tokens_of("answer", 10))
    assert len(known.lineage) <= 2 * known.lineage.ALIKE
    assert known.program_of([*context, *SYSTEM]) is not None


def remembered(
    lineage: Lineage, program: str, tokens: list[int], hashed: int, prompt_tokens: int, path_ms: float = 1.0
) -> None:
    """As `Known.finished`, but only the first blocks have hashes."""
    lineage.remember(program, path_ms, hashes(tokens)[:hashed], tokens, prompt_tokens)


@pytest.mark.parametrize(("length", "kept"), [(16 + 31, 1), (16 + 32, 0), (16 + 40, 0)])
def test_a_tail_is_shorter_than_two_blocks(length: int, kept: int) -> None:
    """Where the hash of a block is still to come, its tokens are compared; of two blocks a hash must have been lost."""
    lineage = Lineage(BLOCK)
    remembered(lineage, "a", tokens_of("all", length), 1, length - WEAK_OUTPUT_TOKENS)
    assert len(lineage) == kept


def test_where_hashes_are_lost_the_end_of_the_prompt_may_still_be_remembered() -> None:
    lineage = Lineage(BLOCK)
    every = tokens_of("all", 40 + 60)
    remembered(lineage, "a", every, 2, 40, path_ms=7.0)
    assert len(lineage) == 1
    found = lineage.find(hashes([*every, 1]), [*every, 1])
    assert found is not None
    assert (found.program, found.path_ms, found.continued) == ("a", 7.0, 1)


def test_a_prompt_is_longer_than_what_it_goes_on_from() -> None:
    known = Known()
    context = known.finished("a", tokens_of("task", 14), tokens_of("answer", WEAK_OUTPUT_TOKENS))
    assert known.program_of(context) is None
    assert known.program_of([*context, 7]) == "a"


def test_a_prompt_goes_on_from_its_first_block() -> None:
    known = Known()
    context = known.finished("a", tokens_of("task", 12), tokens_of("answer", WEAK_OUTPUT_TOKENS))
    assert known.program_of([*context, 7]) == "a"


def test_of_sequences_that_end_in_one_block_the_longest_wins() -> None:
    lineage = Lineage(BLOCK)
    every = tokens_of("all", 30)
    remembered(lineage, "short", every[:20], 1, 16)
    remembered(lineage, "long", every[:25], 1, 21)
    found = lineage.find(hashes(every), every)
    assert found is not None
    assert found.program == "long"


def test_of_those_alike_the_first_are_forgotten() -> None:
    lineage = Lineage(BLOCK)
    for number in range(lineage.ALIKE):
        remembered(lineage, f"p{number}", tokens_of("all", 16), 1, 12)
    assert len(lineage) == lineage.ALIKE
    for number in range(3):
        remembered(lineage, f"more {number}", tokens_of("all", 16), 1, 12)
    assert len(lineage) == lineage.ALIKE
    kept = [one.program for one in lineage._by_hash[hashes(tokens_of("all", 16))[0]]]
    assert (kept[0], kept[-1]) == ("p3", "more 2")


def test_no_more_are_remembered_than_may_be_and_no_fewer() -> None:
    lineage = Lineage(BLOCK, capacity=3)
    for number in range(3):
        remembered(lineage, f"p{number}", tokens_of(f"all {number}", 16), 1, 12)
    remembered(lineage, "p1 again", tokens_of("all 1", 16), 1, 12)
    # p0 was the oldest
    assert len(lineage) == 3
    found = [lineage.find(hashes(every), every) for every in ([*tokens_of(f"all {n}", 16), 7] for n in range(3))]
    assert [one and one.program for one in found] == [None, "p1", "p2"]
    remembered(lineage, "new", tokens_of("all 4", 16), 1, 12)
    # the block of p1 was met again after that of p2
    found = [lineage.find(hashes(every), every) for every in ([*tokens_of(f"all {n}", 16), 7] for n in range(3))]
    assert [one is not None for one in found] == [False, True, False]
    assert len(lineage) == 3


# Drawn agents


def replay(sessions: list[Session], block: int) -> list[tuple[str, str]]:
    """All sessions at once, a turn each in turns, without hints; returns (true program, inferred program) per request."""
    by_name = {session.name: session for session in sessions}
    lineage, pairs = Lineage(block), []
    # Program, session, context so far and next turn of every agent that is not through.
    going = [(one.name, one, list[int](), 0) for one in sessions if not one.forked]
    while going:
        program, session, context, number = going.pop(0)
        turn = session.turns[number]
        prompt = list(turn.context) if turn.context is not None else [*context, *turn.added]
        found = lineage.find(hashes(prompt, block), prompt)
        inferred = found.program if found is not None else f"{session.name}-{number}"
        pairs.append((program, inferred))
        every = prompt + [pinned_token(session.name, number)] * turn.answer
        lineage.remember(inferred, 0.0, hashes(every, block), every, len(prompt))
        going += [(program, by_name[name], list(every), 0) for name in turn.spawns]
        if number + 1 < len(session.turns):
            going.append((program, session, every, number + 1))
    return pairs


def precision_and_recall(pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """Over pairs of requests: how many put together belong together, and how many that do are."""

    def together(clusters: Counter) -> int:
        return sum(count * (count - 1) // 2 for count in clusters.values())

    right = together(Counter(pairs))
    return (
        right / together(Counter(inferred for _, inferred in pairs)),
        right / together(Counter(true for true, _ in pairs)),
    )


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("workload", ["react", "coding", "plan-execute"])
def test_agents_without_hints_are_told_apart(workload: str, block: int) -> None:
    sessions = draw_sessions(find_workload(workload), WorkloadOptions(agents=8, sessions=3, scale=0.3), seed=3)
    pairs = replay(sessions, block)
    assert len(pairs) > 100
    precision, recall = precision_and_recall(pairs)
    print(f"{workload}, blocks of {block}: precision {precision:.3f}, recall {recall:.3f}, {len(pairs)} requests")
    assert precision >= 0.98
    assert recall >= 0.98


def test_the_measure_of_pairs() -> None:
    pairs = [("a", "x"), ("a", "x"), ("b", "x"), ("b", "y")]
    one = list(combinations(range(4), 2))
    right = sum(pairs[i] == pairs[j] for i, j in one)
    assert precision_and_recall(pairs) == (
        right / sum(pairs[i][1] == pairs[j][1] for i, j in one),
        right / sum(pairs[i][0] == pairs[j][0] for i, j in one),
    )
