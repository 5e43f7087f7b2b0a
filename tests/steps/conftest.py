"""What all step tables share."""

from itertools import count

import pytest

from tests.support import schedulers


@pytest.fixture(autouse=True)
def numbered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are the same whichever tests ran before: else one may by chance seem to go on from another. None begins at 0, as
    lists of tests do."""
    monkeypatch.setattr(schedulers, "_numbers", count(1))
