"""Without hints, agents are told apart and found again over chat templates that write histories anew."""

import pytest
from tokenizers import Tokenizer

from tests.support.chat_histories import MIXES, TEMPLATES, precision_and_recall, replay, toy_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return toy_tokenizer()


UNLIKE = "Hermes, answers in other tokens than their text has"


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != UNLIKE])
def test_rewritten_histories_keep_their_programs(tokenizer: Tokenizer, template: str, mix: str) -> None:
    seen = replay(tokenizer, TEMPLATES[template], mix)
    precision, recall = precision_and_recall(seen.pairs)
    print(f"{template}, {mix}: precision {precision:.3f}, recall {recall:.3f}, {seen.found} of {seen.later} found")
    assert len(seen.pairs) > 100
    assert precision >= 0.98
    assert recall >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("mix", "least"), [("shared system prompt", 0.95), ("forks", 0.9), ("identical prompts", 0.7)])
def test_answers_of_which_nothing_is_left_are_found_unless_others_had_the_prompt(
    tokenizer: Tokenizer, mix: str, least: float
) -> None:
    """A grammar made the model write other tokens: only the beginning of a prompt and its end tell whose it is."""
    seen = replay(tokenizer, TEMPLATES[UNLIKE], mix)
    precision, recall = precision_and_recall(seen.pairs)
    print(f"{mix}: precision {precision:.3f}, recall {recall:.3f}, {seen.found} of {seen.later} found")
    assert precision >= 0.98
    assert recall >= least
