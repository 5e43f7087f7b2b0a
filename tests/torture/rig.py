"""Runs episodes on a real engine in float32, and says what is not as it must be."""

import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from vllm import LLM

from tests.support.lane_engine import lane_is_up, worker
from tests.support.mix import close, scheduler_of
from tests.torture.adapters import adapter
from tests.torture.contents import Contents, Looked
from tests.torture.episode import Episode, Event, Request, prompt_of
from vllm_agentserve.gpucheck.compare import differences, is_tie
from vllm_agentserve.gpucheck.scripted_requests import Completions, completions
from vllm_agentserve.lanes.lane import NoLane
from vllm_agentserve.scheduler.features.lane import LaneFeature

LOOK_EVERY_STEPS = 16
"""So often all state is checked while requests run; the prefix cache as often on average, at random moments."""
RESETS = 6
"""Tries of a reset under running requests."""
LIMIT_STEPS = 20_000
"""An episode that takes more is stuck."""


@dataclass
class Outcome:
    """What became of an episode."""

    answers: Completions = field(default_factory=dict)
    prompts: dict[str, list[int]] = field(default_factory=dict)
    requests: int = 0
    together: int = 0
    """Requests that came in the same step as another."""
    aborts: int = 0
    preemptions: int = 0
    faults: int = 0
    """Lanes killed, caches reset, pauses."""
    wrong: list[str] = field(default_factory=list)
    """State that does not agree, requests without an end, KV blocks with wrong contents."""


class Rig:
    """Runs episodes.

    Args:
        llm: an engine in this process, with our scheduler or without.
        contents: compares what its KV blocks hold; None compares answers only.
    """

    def __init__(self, llm: LLM, contents: Contents | None = None) -> None:
        self.llm = llm
        self.contents = contents
        self.engine = llm.llm_engine
        self.scheduler = scheduler_of(llm)
        self._preempted = 0
        preempt = self.scheduler._preempt_request

        def counted(request: Any, *args: Any, **kwargs: Any) -> None:
            self._preempted += 1
            preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = counted

    def run(self, episode: Episode) -> Outcome:
        """Runs an episode from an empty prefix cache to its end."""
        outcome = Outcome()
        self._preempted = 0
        self.lane_is_up()
        self.scheduler.reset_prefix_cache()
        if self.contents is not None:
            self.contents.begin()
        moments = random.Random(episode.seed)
        waiting = sorted((one for one in episode.requests if one.follows is None), key=lambda one: one.step)
        due = [(one.step, one) for one in waiting]
        behind: dict[str, list[Request]] = {}
        for one in episode.requests:
            if one.follows is not None:
                behind.setdefault(one.follows, []).append(one)
        by_name = {one.name: one for one in episode.requests}
        unanswered: set[str] = set()
        events = list(episode.events)
        resume_at: int | None = None
        step = 0
        while due or events or resume_at is not None or self.engine.has_unfinished_requests():
            if step > LIMIT_STEPS:
                outcome.wrong.append(f"after {step} steps these have no end: {sorted(unanswered)}")
                self.engine.abort_request(list(unanswered))
                break
            while events and events[0].step <= step:
                resume_at = self.happen(events.pop(0), step, resume_at, outcome)
            if resume_at is not None and step >= resume_at:
                self.core.resume_scheduler()
                resume_at = None
            leaving = []
            coming = [one for at, one in due if at <= step]
            for request in coming:
                parent, context = request.follows, []
                if parent is not None:
                    answer = [] if request.beside else outcome.answers[parent][0].tokens
                    context = outcome.prompts[parent] + answer
                prompt = outcome.prompts[request.name] = prompt_of(episode, request, context)
                outcome.answers[request.name] = {}
                outcome.requests += 1
                unanswered.add(request.name)
                self.engine.add_request(
                    request.name,
                    {"prompt_token_ids": prompt},
                    request.parameters(),
                    lora_request=adapter(request.adapter) if request.adapter else None,
                    session_id=request.session,
                )
                if request.abort_after == 0:
                    leaving.append(request.name)
                for child in behind.get(request.name, []):
                    if child.beside and child.step == 0:
                        coming.append(child)
                    elif child.beside:
                        due.append((step + child.step, child))
            due = [(at, one) for at, one in due if at > step]
            outcome.together += len(coming) if len(coming) > 1 else 0
            for output in self.engine.step():
                request = by_name[output.request_id]
                outcome.answers[request.name] |= completions(output)
                if output.finished:
                    unanswered.discard(request.name)
                    after = (child for child in behind.get(request.name, []) if not child.beside)
                    due += [(step + child.step, child) for child in after]
                elif request.abort_after and len(output.outputs[0].token_ids) >= request.abort_after:
                    leaving.append(request.name)
            leaving = [name for name in dict.fromkeys(leaving) if name in unanswered]
            if leaving:
                self.engine.abort_request(leaving)
                outcome.aborts += len(leaving)
                unanswered -= set(leaving)
            if step % LOOK_EVERY_STEPS == 0:
                outcome.wrong += self.faults()
            if self.contents is not None:
                outcome.wrong += self.contents.after_step()
                if moments.random() < 1 / LOOK_EVERY_STEPS:
                    outcome.wrong += self.contents.published()
            step += 1
        self.settle(outcome)
        outcome.preemptions = self._preempted
        return outcome

    def close(self) -> Looked:
        """Ends the engine; returns how many KV blocks were compared."""
        if self.contents is not None:
            self.contents.close()
        close(self.llm)
        return self.contents.looked if self.contents is not None else Looked()

    @property
    def core(self) -> Any:
        return self.engine.engine_core.engine_core

    def happen(self, event: Event, step: int, resume_at: int | None, outcome: Outcome) -> int | None:
        """Does what the event says, and counts it if there was something to do; returns at which step the engine goes on, if it
        is paused."""
        match event.kind:
            case "reset":
                self.scheduler.reset_prefix_cache()
            case "reset_running":
                self.reset_running()
            case "pause" if resume_at is None:
                self.core.pause_scheduler(mode="keep", clear_cache=False)
                resume_at = step + event.length
            case "kill_lane" if self.lane is not None:
                os.kill(self.lane.pid, signal.SIGKILL)
            case _:
                return resume_at
        outcome.faults += 1
        return resume_at

    def reset_running(self) -> None:
        """On a machine that stands still for longer than the lane is given to let go of its prompts, it is refused."""
        for _ in range(RESETS):
            try:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
            except RuntimeError as error:
                if "has not let go of" not in str(error):
                    raise
            else:
                return
        raise AssertionError(f"the prefix cache could not be reset in {RESETS} tries")

    @property
    def lane(self) -> Any:
        """The lane's process as the worker sees it; None where there is none."""
        if not isinstance(getattr(self.scheduler, "_lane", None), LaneFeature):
            return None
        lane = worker()._lane
        return None if isinstance(lane, NoLane) else lane

    def lane_is_up(self) -> None:
        """Waits for a lane that was killed, so that every episode has one."""
        if self.lane is None:
            return
        for _ in range(3):  # the death may be noticed without a job, when the engine next looks
            self.engine.step()
        lane_is_up(self.llm)

    def settle(self, outcome: Outcome) -> None:
        """Steps an engine without requests until nothing is on its way any more, and looks at what is left."""
        deadline = time.monotonic() + 30
        while self.scheduler.requests and time.monotonic() < deadline:
            self.engine.step()
        if self.scheduler.requests:
            outcome.wrong.append(f"these were never let go: {sorted(self.scheduler.requests)}")
        outcome.wrong += self.faults()
        if self.contents is not None:
            outcome.wrong += self.contents.compare() + self.contents.published() + self.contents.answers()
        if not outcome.wrong and self.scheduler.kv_cache_manager.usage:
            outcome.wrong.append(f"KV blocks are in use without a request: {self.scheduler.kv_cache_manager.usage:.3f}")

    def faults(self) -> list[str]:
        integrity = getattr(self.scheduler, "integrity", None)
        return integrity.faults() if integrity is not None else []


def compare(episode: Episode, stock: Outcome, ours: Outcome) -> tuple[list[str], list[str]]:
    """What differs from stock vLLM, and apart from that the answers in which two tokens were as likely (ties)."""
    wrong, ties = list(ours.wrong), []
    tied: set[str] = set()
    for request in episode.requests:
        if request.name not in ours.answers:
            if request.follows not in tied:
                wrong.append(f"{request.name}: was never sent")
            continue
        if request.follows in tied:
            tied.add(request.name)
            continue
        if found := differences([request], stock.answers, ours.answers):
            if is_tie(stock.answers[request.name], ours.answers[request.name]):
                tied.add(request.name)
                ties.append(request.name)
            else:
                wrong += found
    return wrong, ties
