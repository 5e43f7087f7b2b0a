"""Prompts whose histories were rewritten: the rule on hand-made contexts, and what is remembered."""

from array import array
from types import SimpleNamespace

import pytest

from tests.support.sequences import BLOCK, hashes, tokens_of
from vllm_agentserve.policy import rewritten
from vllm_agentserve.policy.attribution import Attribution
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.rewritten import COMPARED, MOST_COMPARED, SLACK, RewrittenHistories, runs_of

EOS = 2
OPENS = [3, 4, 5]


SYSTEM = tokens_of("system", 50)


class Known:
    """Attribution that is told of finished requests without hints."""

    def __init__(self) -> None:
        self.attribution, self.number = Attribution(BLOCK), 0

    def asked(self, prompt: list[int]) -> Call:
        self.number += 1
        request = SimpleNamespace(
            request_id=f"{self.number}", session_id=None, prompt_token_ids=prompt, block_hashes=hashes(prompt)
        )
        call = Call(request)
        call.owner = self.attribution.owner(call)
        return call

    def finished(self, prompt: list[int], answer: list[int]) -> str:
        """The program of a request, which is answered."""
        call = self.asked(prompt)
        request = call.request
        request.all_token_ids, request.num_prompt_tokens = prompt + answer, len(prompt)
        request.num_output_tokens, request.block_hashes = len(answer), hashes(prompt + answer)
        self.attribution.remember(call, 1.0, self.number)
        assert call.owner is not None
        return call.owner.key

    def program_of(self, prompt: list[int]) -> str | None:
        """The program a prompt goes on from, None if it is the first of one."""
        owner = self.asked(prompt).owner
        assert owner is not None
        return owner.key if owner.source == "inferred" else None


@pytest.fixture
def known() -> Known:
    return Known()


def test_reasoning_that_is_left_out_still_continues(known: Known) -> None:
    prompt, content = SYSTEM + tokens_of("task", 40), [*tokens_of("content", 12), EOS]
    program = known.finished(prompt, tokens_of("reasoning", 60) + content)
    assert known.program_of(prompt + content + tokens_of("tool", 30)) == program


def test_a_short_answer_after_reasoning_still_continues(known: Known) -> None:
    prompt, content = SYSTEM + tokens_of("task", 40), [77, EOS]
    program = known.finished(prompt, tokens_of("reasoning", 60) + content)
    assert known.program_of(prompt + content + tokens_of("question", 30)) == program


def test_a_tool_call_with_other_spaces_still_continues(known: Known) -> None:
    prompt, call = SYSTEM + tokens_of("task", 40), tokens_of("call", 20)
    program = known.finished(prompt, [9, *call[:10], 9, *call[10:], EOS])
    assert known.program_of([*prompt, 8, *call[10:], 8, *call[:10], EOS, *tokens_of("tool", 30)]) == program


def test_all_turns_of_an_agent_that_sends_no_reasoning_back_are_one_program(known: Known) -> None:
    context, programs = SYSTEM + tokens_of("task", 40), set()
    for turn in range(5):
        content = [*tokens_of(f"content {turn}", 12), EOS]
        programs.add(known.finished(context, tokens_of(f"reasoning {turn}", 60) + content))
        context = context + content + tokens_of(f"tool {turn}", 25)
    assert len(programs) == 1


@pytest.mark.parametrize("length", [1, SLACK])
def test_what_opens_an_answer_may_be_missing_in_the_history(known: Known, length: int) -> None:
    prompt, content = SYSTEM + tokens_of("task", 40), [*tokens_of("content", 12), EOS]
    program = known.finished(prompt + tokens_of("opens", length), tokens_of("reasoning", 60) + content)
    assert known.program_of(prompt + content + tokens_of("tool", 30)) == program


def test_more_than_what_opens_an_answer_must_not_be_missing(known: Known) -> None:
    prompt, content = SYSTEM + tokens_of("task", 40), [*tokens_of("content", 12), EOS]
    known.finished(prompt + tokens_of("opens", SLACK + 1), tokens_of("reasoning", 60) + content)
    assert known.program_of(prompt + content + tokens_of("tool", 30)) is None


def test_another_end_of_the_prompt_is_another_program(known: Known) -> None:
    prompt, content = SYSTEM + tokens_of("task", 40), [*tokens_of("content", 12), EOS]
    known.finished(prompt, content)
    other = [*prompt[:-1], prompt[-1] + 1, *content, *tokens_of("tool", 30)]
    assert known.program_of(other) is None


def test_what_only_shares_the_first_prompt_is_another_program(known: Known) -> None:
    """A first prompt may be a bare system prompt, that others begin with too."""
    known.finished(SYSTEM, tokens_of("hello", 20))
    assert known.program_of(SYSTEM + tokens_of("task", 60)) is None


def test_a_later_prompt_is_nobody_elses_whatever_became_of_its_answer(known: Known) -> None:
    first, answer = SYSTEM + tokens_of("task", 40), tokens_of("answer", 20)
    program = known.finished(first, answer)
    second = first + answer + tokens_of("tool", 30)
    assert known.finished(second, tokens_of("answer 2", 20)) == program
    assert known.program_of(second + tokens_of("summary", 40)) == program


def test_the_same_prompt_again_continues_nothing(known: Known) -> None:
    prompt = SYSTEM + tokens_of("task", 40)
    known.finished(prompt, tokens_of("answer", 20))
    assert known.program_of(prompt) is None


def test_identical_prompts_are_told_apart_by_their_answers(known: Known) -> None:
    prompt, called = SYSTEM + tokens_of("task", 40), tokens_of("call", 8)
    answers = {n: [*called, *tokens_of(f"arguments {n}", 6), *called[:4], EOS] for n in range(6)}
    programs = {n: known.finished(prompt, [*tokens_of("reasoning", 20 + n), *answers[n]]) for n in answers}
    assert len(set(programs.values())) == 6
    for n in (3, 1, 5, 0, 4, 2):
        assert known.program_of(prompt + answers[n] + tokens_of("tool", 30)) == programs[n]


def test_words_that_are_left_out_do_not_make_another_answer_more_alike(known: Known) -> None:
    """A template may leave out what a model said beside its tool call, and write words of its own."""
    prompt, called = SYSTEM + tokens_of("task", 40), tokens_of("call", 8)
    arguments = {n: tokens_of(f"arguments {n}", 6) for n in range(2)}
    talked = known.finished(prompt, [*tokens_of("words", 60), *called, *arguments[0], EOS])
    known.finished(prompt, [*called, *arguments[1], EOS])
    written = [*tokens_of("words of the template", 60), *called, *arguments[0], EOS]
    assert known.program_of(prompt + written + tokens_of("tool", 30)) == talked


def test_answers_that_begin_alike_do_not_join_programs(known: Known) -> None:
    """Their first four tokens are the same, and the rest was written anew."""
    prompt, begins = SYSTEM + tokens_of("task", 40), tokens_of("calls", 5)
    programs = [known.finished(prompt, begins + tokens_of(f"arguments {n}", 12) + [EOS]) for n in range(4)]
    for n in (2, 3, 0, 1):
        arguments = tokens_of(f"arguments {n}", 12)
        rewritten = [*begins, 9, *arguments[6:], 9, *arguments[:6], EOS]
        assert known.program_of(prompt + rewritten + tokens_of("tool", 30)) == programs[n]


def test_of_rewritten_prompts_the_longest_counts(known: Known) -> None:
    first, content = SYSTEM + tokens_of("task", 40), [*tokens_of("content", 12), EOS]
    known.finished(first, tokens_of("reasoning", 30) + content)
    second, more = first + content + tokens_of("tool", 30), [*tokens_of("more", 12), EOS]
    known.finished(second, tokens_of("reasoning 2", 30) + more)
    owner = known.asked(second + more + tokens_of("tool 2", 30)).owner
    assert owner is not None
    assert owner.end == 2


def asked_with(name: str) -> list[int]:
    """A first prompt as a chat template writes it: it opens the assistant's turn at its end."""
    return [*SYSTEM, *tokens_of(name, 40), *OPENS]


def test_an_answer_of_which_nothing_is_left_still_continues(known: Known) -> None:
    """A grammar made the model write a tool call in tokens that no tokenizer gives for its text."""
    prompt = asked_with("task")
    program = known.finished(prompt, [*tokens_of("odd tokens", 30), EOS])
    later = [*prompt, *tokens_of("tool call", 9), EOS, *tokens_of("result", 30), *OPENS]
    assert known.finished(later, [*tokens_of("odd tokens 2", 30), EOS]) == program
    last = [*later, *tokens_of("tool call 2", 9), EOS, *tokens_of("result 2", 30), *OPENS]
    assert known.program_of(last) == program


@pytest.mark.parametrize(
    "follows",
    [
        [*tokens_of("shot", 9), EOS, *tokens_of("question", 30)],
        [*tokens_of("shot", 9), *tokens_of("question", 30), *OPENS],
        [*tokens_of("shot", 9), EOS, *tokens_of("question", 30), OPENS[0], 9, OPENS[2]],
    ],
    ids=["opens nothing", "has no end of an answer", "opens something else"],
)
def test_what_does_not_stand_where_an_answer_stood_is_another_program(known: Known, follows: list[int]) -> None:
    prompt = asked_with("task")
    known.finished(prompt, [*tokens_of("odd tokens", 30), EOS])
    assert known.program_of(prompt + follows) is None


def test_of_an_answer_of_which_nothing_is_left_nobody_knows_whose_it_was_where_several_had_the_prompt(
    known: Known,
) -> None:
    prompt = asked_with("task")
    programs = [known.finished(prompt, [*tokens_of(f"odd tokens {n}", 30), EOS]) for n in range(2)]
    later = [[*prompt, *tokens_of(f"call {n}", 9), EOS, *tokens_of("result", 30), *OPENS] for n in range(2)]
    assert known.program_of(later[0]) is None
    like = [*prompt, *tokens_of("odd tokens 0", 30)[10:], EOS, *tokens_of("result", 30), *OPENS]
    assert known.program_of(like) == programs[0]
    assert known.program_of(later[1]) == programs[1]


def test_of_an_answer_of_which_nothing_is_left_one_prompt_goes_on(known: Known) -> None:
    """Examples that many prompts begin with may have been asked once by themselves."""
    prompt = asked_with("example")
    program = known.finished(prompt, [*tokens_of("odd tokens", 30), EOS])
    others = [[*prompt, 77, EOS, *tokens_of(f"question {n}", 30), *OPENS] for n in range(3)]
    assert [known.program_of(one) for one in others] == [program, None, None]


def remember(histories: RewrittenHistories, name: str, prompt: list[int], answer: list[int]) -> None:
    every = prompt + answer
    histories.remember(name, 0.0, hashes(every), every, len(prompt))


def test_the_oldest_are_forgotten() -> None:
    histories = RewrittenHistories(BLOCK, capacity=10)
    for n in range(30):
        remember(histories, f"p{n}", tokens_of(f"task {n}", 60), tokens_of(f"answer {n}", 20))
    assert len(histories) == 10
    kept = [tokens_of(f"task {n}", 60) + tokens_of(f"answer {n}", 20)[5:] + SYSTEM for n in (19, 20, 29)]
    found = [histories.find(hashes(prompt), prompt) for prompt in kept]
    assert [one and one.program for one in found] == [None, "p20", "p29"]


def test_the_same_prompt_for_ever_is_remembered_so_often_and_no_more() -> None:
    histories = RewrittenHistories(BLOCK)
    for n in range(3 * histories.ALIKE):
        remember(histories, f"p{n}", tokens_of("task", 60), tokens_of(f"answer {n}", 20))
    assert len(histories) == histories.ALIKE


def test_what_has_no_answer_or_no_block_is_not_remembered() -> None:
    histories = RewrittenHistories(BLOCK)
    remember(histories, "none", tokens_of("task", 60), [])
    remember(histories, "short", tokens_of("task", BLOCK + SLACK - 1), tokens_of("answer", 20))
    assert not len(histories)
    remember(histories, "just long enough", tokens_of("task", BLOCK + SLACK), tokens_of("answer", 20))
    assert len(histories) == 1


def test_a_long_answer_takes_no_more_memory_than_its_end() -> None:
    histories = RewrittenHistories(BLOCK)
    prompt, content = tokens_of("task", 60), [*tokens_of("content", 40), EOS]
    remember(histories, "p", prompt, tokens_of("reasoning", 20_000) + content)
    found = histories.find(hashes(prompt + content + SYSTEM), prompt + content + SYSTEM)
    assert found is not None
    assert len(found.answer) <= 512


def test_many_answers_to_one_prompt_do_not_make_a_look_up_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine waits for a look-up: what follows the prompt is read once, not once for each answer."""
    histories = RewrittenHistories(BLOCK)
    prompt, follows = tokens_of("task", 60), tokens_of("content", 60) + tokens_of("result", 9000)
    for n in range(histories.ALIKE):
        remember(histories, f"p{n}", prompt, tokens_of(f"reasoning {n}", 8000) + (follows[:60] if n == 7 else []))
    read = []

    def counted(tokens: "array[int]") -> set[tuple[int, ...]]:
        read.append(len(tokens))
        return runs_of(tokens)

    monkeypatch.setattr(rewritten, "runs_of", counted)
    found = histories.find(hashes(prompt + follows), prompt + follows)
    assert found is not None
    assert found.program == "p7"
    assert sum(read) <= 4 * histories.ALIKE * COMPARED


@pytest.mark.parametrize(("between", "expected"), [(MOST_COMPARED - 1, "first"), (MOST_COMPARED, None)])
def test_many_turns_whose_answers_are_gone_do_not_make_a_look_up_long(between: int, expected: str | None) -> None:
    histories = RewrittenHistories(BLOCK)
    prompt, answer = tokens_of("task", 60), tokens_of("answer", 20)
    remember(histories, "first", prompt, answer)
    later = prompt + answer
    for n in range(between):
        later += tokens_of(f"turn {n}", 40)
        remember(histories, f"turn {n}", later, tokens_of(f"gone {n}", 20))
    later += tokens_of("last turn", 40)
    found = histories.find(hashes(later), later)
    assert (found and found.program) == expected
