"""What every program has received so far, and the level at which its next call waits (Autellix, arXiv 2502.13965).

A program is one run of an agent: many calls with tools between them. First come first served makes a short program wait
behind long ones at every turn; least attained service first does not, and needs no knowledge of the future.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice
from math import log2
from typing import Literal

from vllm_agentserve.policy.call import Call, Chunk
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.program import DecodeClock, Program, ProgramCall, Stage

Policy = Literal["plas", "atlas"]


class ProgramTable:
    """Charges programs for what their calls receive, and says at which level a call waits; all O(1).

    Service is counted in ms of the engine's own time: a chunk its share of a step, a decode the step's time divided by the
    calls that decode. The latter goes to all decoding calls at once, by the clock they share.

    What is known of a call stands in its `Call.program`; a call that never arrived has none, and is ignored.

    Args:
        policy: `plas`: a call waits by its program's attained service. `atlas`: by the longest path to it, a path being the
            calls that had to follow one another, so that the threads of a program do not count against each other.
        levels: how many there are; inside one, arrival decides.
        quantum_ms: service up to which a call is at level 0; each further level has twice the room.
        promote_ratio: a call that has waited this many times its program's service, or quanta if it had less, is at level 0;
            the time it ran between two waits does not count, nor that in which it could not run.
        ttl_s: a program without calls is forgotten after so long.
        capacity: programs kept, the longest unseen without calls are forgotten first.
    """

    def __init__(
        self,
        policy: Policy,
        levels: int = 8,
        quantum_ms: float = 500.0,
        promote_ratio: float = 10.0,
        ttl_s: float = 3600.0,
        capacity: int = 65_536,
    ) -> None:
        self._policy = policy
        self._levels = levels
        self._quantum_ms = quantum_ms
        self._promote_ratio = promote_ratio
        self._ttl_s = ttl_s
        self._capacity = capacity
        self._programs: dict[str, Program] = {}
        self._idle: OrderedDict[str, Program] = OrderedDict()
        """Those without calls, the longest unseen first."""
        self._active: OrderedDict[str, Program] = OrderedDict()
        """Those with calls, the one whose latest call came last at the end."""
        self._decoding: OrderedDict[str, Program] = OrderedDict()
        """Those with decoding calls, in turns."""
        self.clock = DecodeClock()
        self._now = 0.0
        self.decoding = self.ended = 0
        """Calls that decode; calls that have ended, which is the number of the last end."""
        self.waiting = [0] * levels
        """Waiting calls by the level they were last seen at."""
        self.by_service = [0] * levels
        """Programs by the level of what they had received when that was last looked at."""
        self.promotions = 0
        """Calls moved to level 0 because they had waited too long."""

    def __len__(self) -> int:
        return len(self._programs)

    # -- events ---------------------------------------------------------------------------------------------------------

    def arrive(
        self,
        call: Call,
        key: str,
        path_ms: float | None,
        now: float,
        thread: str | None = None,
        end: int | None = None,
    ) -> None:
        """A call came.

        Args:
            call: not known yet.
            key: its program's.
            path_ms: length of the path to it; None where its parent is not known: the program's longest.
            now: time in s.
            thread: which of the program's threads it continues; the path is then the thread's, where that has one.
            end: number of the end of the call it goes on from: what ended since counts for the path too.
        """
        self._now = now
        program = self._program(key, now)
        if thread is not None and thread in program.threads:
            path_ms = program.threads[thread]
        elif path_ms is None:
            path_ms = program.path_ms
        elif end is not None:
            path_ms = program.path_from(end, path_ms)
        level = self.level_of(self.clock.attained_ms(program) if self._policy == "plas" else path_ms)
        program.turns += 1
        self._active[key] = program
        self._active.move_to_end(key)
        call.program = ProgramCall(program, path_ms, now, level, thread)
        self._enter(call.program, Stage.WAITING)

    def charge(self, call: Call, ms: float) -> None:
        """The call received so much service for its prompt."""
        part = call.program
        if part is not None:
            part.service_ms += ms
            part.program.service_ms += ms
            self._look_at(part.program)

    def prefills(self, call: Call, prompt_tokens: int, chunk: Chunk, now: float | None = None) -> None:
        """A chunk of the call's prompt is scheduled.

        Args:
            call: its call.
            prompt_tokens: length of the whole prompt.
            chunk: with the tokens computed before it; before the first one, those that were cached.
            now: time in s; the latest time the table knows where it is not given.
        """
        self._now = self._now if now is None else now
        part = call.program
        if part is None:
            return
        stage = Stage.RESUME if chunk.phase is Phase.RESUME_PREFILL else Stage.COLD
        if part.stage is not stage:
            self._move(part, stage)
        program, computed = part.program, chunk.context + chunk.tokens
        if not part.admitted:
            part.admitted = True
            program.prompt_tokens += prompt_tokens
            program.cached_tokens += min(chunk.context, prompt_tokens)
        program.kv_tokens += computed - part.kv_tokens
        part.kv_tokens = computed

    def advance(self, ms: float, step_ms: float = 0.0, share: float = 1.0) -> None:
        """Every decoding call received so much service, and this share of a token, in a step that took `step_ms`."""
        self.clock.advance(ms, step_ms, share)

    def decodes(self, call: Call) -> None:
        """The call decodes from now on."""
        part = call.program
        if part is not None and part.stage is not Stage.DECODING:
            self._move(part, Stage.DECODING)

    def pauses(self, call: Call, now: float | None = None) -> None:
        """The call lost its place and its KV and waits again, unless it waits already; `now` as for `prefills`.

        A streamed session between two parts of its input goes on waiting for its client.
        """
        self._now = self._now if now is None else now
        part = call.program
        if part is not None and part.stage is not Stage.WAITING:
            if part.stage is not Stage.PAUSED:
                part.since = self._now
                self._move(part, Stage.WAITING)
            self._let_go(part)

    def suspends(self, call: Call, now: float) -> None:
        """The call has answered a part of its input and waits for its client to send the next one; it keeps its KV."""
        self._now = now
        if call.program is not None:
            self._move(call.program, Stage.PAUSED)

    def continues(self, call: Call, now: float) -> None:
        """The next part of its input is there: the call waits again, and has its KV."""
        self._now = now
        if call.program is not None:
            call.program.since = now
            self._move(call.program, Stage.WAITING)

    def update_level(self, call: Call, now: float) -> None:
        """Brings the level at which a waiting call waits up to date: its program received service, or it has waited too long."""
        self._now = now
        part = call.program
        if part is None:
            return
        if not part.promoted:
            enough_ms = self._promote_ratio * max(self.clock.attained_ms(part.program), self._quantum_ms)
            if (part.has_waited_s(now) - call.could_not_run_s(now)) * 1000 > enough_ms:
                part.promoted = True
                self.promotions += 1
        level = self.standing(call)
        if part.level != level:
            if part.stage is Stage.WAITING:
                self.waiting[part.level] -= 1
                self.waiting[level] += 1
            part.level = level

    def finish(self, call: Call, now: float) -> tuple[str, float] | None:
        """The call has ended: returns its program's key and the length of the path to its end; None if it is not known."""
        self._now = now
        part = call.program
        if part is None:
            return None
        call.program = None
        program = part.program
        self._move(part, Stage.DONE)
        self._let_go(part)
        path_ms = part.path_ms + part.service_ms
        program.seen = now
        self.ended += 1
        program.ends(self.ended, part.thread, path_ms)
        if not program.calls:
            self._active.pop(program.key, None)
            self._idle[program.key] = program
        return program.key, path_ms

    # -- questions ------------------------------------------------------------------------------------------------------

    def attained_ms(self, program: Program) -> float:
        """Attained service of the program."""
        return self.clock.attained_ms(program)

    def level_of(self, ms: float) -> int:
        """The level of so much service, or of a path of that length."""
        return min(int(log2(max(ms, 0.0) / self._quantum_ms + 1)), self._levels - 1)

    def standing(self, call: Call) -> int:
        """The level of a call, waiting or not, 0 is the first; with `atlas` what it has received itself counts too. 0 for a
        promoted one, and for one that is not known."""
        part = call.program
        if part is None or part.promoted:
            return 0
        if self._policy == "plas":
            return self.level_of(self.clock.attained_ms(part.program))
        return self.level_of(part.path_ms + self.clock.received_ms(part))

    def next_level(self, program: Program) -> int:
        """The level at which its next call would wait."""
        return self.level_of(self.clock.attained_ms(program) if self._policy == "plas" else program.path_ms)

    def service_bounds_ms(self) -> list[float]:
        """The most service of every level but the last, which has no bound."""
        return [self._quantum_ms * (2.0 ** (level + 1) - 1) for level in range(self._levels - 1)]

    def look_again(self, limit: int, now: float) -> None:
        """Sorts the next `limit` programs with decoding calls, in turns, into `by_service`: no event says that they moved up."""
        self._now = now
        for _ in range(min(limit, len(self._decoding))):
            key, program = self._decoding.popitem(last=False)
            self._look_at(program)
            self._decoding[key] = program

    def shown(self, limit: int) -> Iterator[tuple[str, Program]]:
        """At most `limit` programs with their keys, the latest first: those with calls under way, then others; O(limit)."""
        yield from islice(reversed(self._active.items()), limit)
        yield from islice(reversed(self._idle.items()), max(limit - len(self._active), 0))

    def faults(self, calls: Iterable[Call]) -> list[str]:
        """What does not agree, `calls` being all there are; O(programs + calls)."""
        found = []
        parts = [call.program for call in calls if call.program is not None]
        stages = Counter((id(part.program), part.stage) for part in parts)
        waiting: dict[int, set[ProgramCall]] = {}
        for part in parts:
            if part.stage is Stage.WAITING:
                waiting.setdefault(id(part.program), set()).add(part)
        for key, program in self._programs.items():
            counted = [stages[id(program), stage] for stage in Stage if stage is not Stage.DONE]
            if program.in_stage[: Stage.DONE] != counted:
                found.append(f"{key!r} counts {program.in_stage[: Stage.DONE]} calls by stage, and has {counted}")
            if (key in self._decoding) != bool(program.decoding):
                found.append(f"{key!r} is not where programs with {program.decoding} decoding calls are")
            if (key in self._idle) == bool(program.calls) or (key in self._active) != bool(program.calls):
                found.append(f"{key!r} is not where programs with {program.calls} calls are")
            if not program.calls and program.kv_tokens:
                found.append(f"{key!r} has no calls, and holds {program.kv_tokens} tokens")
            if set(program.waiting) != waiting.get(id(program), set()):
                found.append(f"{key!r} lists other waiting calls than it has")
        gone = sum(stages.values()) - sum(program.calls for program in self._programs.values())
        if gone:
            found.append(f"{gone} calls belong to programs that are gone")
        if self.decoding != sum(part.stage is Stage.DECODING for part in parts):
            found.append(f"{self.decoding} calls are counted as decoding")
        levels = Counter(program.service_level for program in self._programs.values())
        if self.by_service != [levels[level] for level in range(self._levels)]:
            found.append("programs are not at the levels that are counted")
        by_level = Counter(part.level for part in parts if part.stage is Stage.WAITING)
        if self.waiting != [by_level[level] for level in range(self._levels)]:
            found.append("calls do not wait at the levels that are counted")
        return found

    # -- stages ---------------------------------------------------------------------------------------------------------

    def _move(self, part: ProgramCall, stage: Stage) -> None:
        self._leave(part)
        self._enter(part, stage)

    def _enter(self, part: ProgramCall, stage: Stage) -> None:
        program = part.program
        part.stage = stage
        if stage is Stage.DONE:
            return
        program.in_stage[stage] += 1
        if stage is Stage.WAITING:
            program.waiting[part] = None
            self.waiting[part.level] += 1
        elif stage is Stage.DECODING:
            self.decoding += 1
            self._decoding[program.key] = program
            self.clock.read(part, -1)

    def _leave(self, part: ProgramCall) -> None:
        program = part.program
        program.in_stage[part.stage] -= 1
        if part.stage is Stage.WAITING:
            part.waited_s += self._now - part.since
            del program.waiting[part]
            self.waiting[part.level] -= 1
        elif part.stage is Stage.DECODING:
            self.decoding -= 1
            self.clock.read(part, 1)
            if not program.decoding:
                del self._decoding[program.key]
            self._look_at(program)

    def _let_go(self, part: ProgramCall) -> None:
        part.program.kv_tokens -= part.kv_tokens
        part.kv_tokens = 0

    def _look_at(self, program: Program) -> None:
        level = self.level_of(self.clock.attained_ms(program))
        if level != program.service_level:
            self.by_service[program.service_level] -= 1
            self.by_service[level] += 1
            program.service_level = level

    def _program(self, key: str, now: float) -> Program:
        """The program of that key, which has a call now; a new one where it is not known, or no longer."""
        # With one arrival at a time, the two longest unseen ones are enough to keep the bounds.
        for name in [*islice(self._idle, 2), key]:
            idle = self._idle.get(name)
            if idle and (now - idle.seen > self._ttl_s or (name != key and len(self._programs) > self._capacity)):
                del self._idle[name], self._programs[name]
                self.by_service[idle.service_level] -= 1
        if key not in self._programs:
            self._programs[key] = Program(key, self.ended)
            self.by_service[0] += 1
        self._idle.pop(key, None)
        return self._programs[key]
