"""Cuts a failing episode down to one that still fails, with as few requests and events as a number of tries finds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.torture.episode import Episode, Request

T = TypeVar("T")


def closed(requests: Sequence[Request]) -> tuple[Request, ...]:
    """Without those that follow a request that is not there, or that is not answered to its end."""
    kept: dict[str, Request] = {}
    for request in requests:
        parent = kept.get(request.follows) if request.follows is not None else None
        if request.follows is None or (parent is not None and (request.beside or parent.abort_after is None)):
            kept[request.name] = request
    return tuple(kept.values())


def shrink(episode: Episode, fails: Callable[[Episode], bool], tries: int = 40) -> Episode:
    """The smallest failing episode that was found.

    Args:
        episode: fails.
        fails: runs an episode and says whether it fails.
        tries: how many episodes it may run.
    """
    left = tries

    def still(candidate: Episode) -> bool:
        nonlocal left
        if left <= 0:
            return False
        left -= 1
        return fails(candidate)

    def without(items: tuple[T, ...], rebuild: Callable[[tuple[T, ...]], Episode]) -> tuple[T, ...]:
        """Takes away ever smaller parts, as long as what is left fails."""
        size = len(items)
        while size >= 1 and items and left > 0:
            at = 0
            while at < len(items):
                fewer = items[:at] + items[at + size :]
                candidate = rebuild(fewer)
                if still(candidate):
                    items = fewer
                else:
                    at += size
            size //= 2
        return items

    events = without(episode.events, lambda fewer: replace(episode, events=fewer))
    episode = replace(episode, events=events)
    requests = without(episode.requests, lambda fewer: replace(episode, requests=closed(fewer)))
    return replace(episode, requests=closed(requests))
