"""Without hints, agents are told apart and found again over chat templates that write histories anew."""

import pytest
from tokenizers import Tokenizer

from tests.support.chat_histories import MIXES, TEMPLATES, precision_and_recall, replay, toy_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return toy_tokenizer()


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_rewritten_histories_keep_their_programs(tokenizer: Tokenizer, template: str, mix: str) -> None:
    seen = replay(tokenizer, TEMPLATES[template], mix)
    precision, recall = precision_and_recall(seen.pairs)
    print(f"{template}, {mix}: precision {precision:.3f}, recall {recall:.3f}, {seen.found} of {seen.later} found")
    assert len(seen.pairs) > 100
    assert precision >= 0.98
    assert recall >= 0.95
