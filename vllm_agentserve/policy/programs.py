"""What every program has received so far, and the level at which its next call waits (Autellix, arXiv 2502.13965).

A program is one run of an agent: many calls with tools between them. First come first served makes a short program wait
behind long ones at every turn; least attained service first does not, and needs no knowledge of the future.
"""

from collections import Counter, OrderedDict
from collections.abc import Container, Iterator
from itertools import islice
from math import log2
from typing import Literal

from vllm_agentserve.policy.census import Census, Stage
from vllm_agentserve.policy.program import Call, Program

Policy = Literal["plas", "atlas"]


class ProgramTable:
    """Charges programs for what their calls receive, and says at which level a call waits; all O(1).

    Service is counted in ms of the engine's own time: a chunk its share of a step, a decode the step's time divided by the
    calls that decode. The latter goes to all decoding calls at once: they share one clock, and a call's part is what the clock
    ran while it decoded.

    Args:
        policy: `plas`: a call waits by its program's attained service. `atlas`: by the longest path to it, a path being the
            calls that had to follow one another, so that the threads of a program do not count against each other.
        levels: how many there are; inside one, arrival decides.
        quantum_ms: service up to which a call is at level 0; each further level has twice the room.
        promote_ratio: a call that has waited this many times its program's service, or quanta if it had less, is at level 0;
            the time it ran between two waits does not count.
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
        self._calls: dict[str, Call] = {}
        self._decoding: OrderedDict[str, Program] = OrderedDict()
        """Those with decoding calls, in turns."""
        self._clock_ms = 0.0
        self._now = 0.0
        self.decoding = self.ended = 0
        """Calls that decode; calls that have ended, which is the number of the last end."""
        self.census = Census(levels)
        """Where the calls are."""
        self.by_service = [0] * levels
        """Programs by the level of what they had received when that was last looked at."""
        self.promotions = 0
        """Calls moved to level 0 because they had waited too long."""

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._calls

    def arrive(
        self,
        call_id: str,
        key: str,
        path_ms: float | None,
        now: float,
        thread: str | None = None,
        end: int | None = None,
    ) -> None:
        """A call came.

        Args:
            call_id: not known yet.
            key: its program's.
            path_ms: length of the path to it; None where its parent is not known: the program's longest.
            now: time in s.
            thread: which of the program's threads it continues; the path is then the thread's, where that has one.
            end: number of the end of the call it goes on from: what ended since counts for the path too.
        """
        self._now = now
        program = self._program(key, now)
        program.calls += 1
        if thread is not None and thread in program.threads:
            path_ms = program.threads[thread]
        elif path_ms is None:
            path_ms = program.path_ms
        elif end is not None:
            path_ms = program.path_from(end, path_ms)
        level = self.level_of(self.attained_ms(program) if self._policy == "plas" else path_ms)
        presence = self.census.arrives(call_id, key, program.tally, level, now)
        self._calls[call_id] = Call(key, program, path_ms, presence, thread)

    def charge(self, call_id: str, ms: float) -> None:
        """The call received so much service for its prompt."""
        call = self._calls.get(call_id)
        if call is not None:
            call.service_ms += ms
            call.program.service_ms += ms
            self._look_at(call.program)

    def prefills(
        self, call_id: str, resume: bool, prompt_tokens: int, before: int, tokens: int, now: float | None = None
    ) -> None:
        """A chunk of the call's prompt is scheduled.

        Args:
            call_id: its call.
            resume: whether it is a resume prefill, else a cold one.
            prompt_tokens: length of the whole prompt.
            before: tokens computed before the chunk; before the first one, those that were cached.
            tokens: in the chunk.
            now: time in s; the latest time the table knows where it is not given.
        """
        self._now = self._now if now is None else now
        call = self._calls.get(call_id)
        if call is not None:
            self._stops_decoding(call)
            stage = Stage.RESUME if resume else Stage.COLD
            self.census.prefills(call.presence, stage, prompt_tokens, before, tokens, self._now)

    def advance(self, ms: float, step_ms: float = 0.0, part: float = 1.0) -> None:
        """Every decoding call received so much service, and this part of a token, in a step that took `step_ms`."""
        self._clock_ms += ms
        self.census.advance(step_ms, part)

    def decodes(self, call_id: str) -> None:
        """The call decodes from now on."""
        call = self._calls.get(call_id)
        if call is not None and call.decodes_since_ms is None:
            call.decodes_since_ms = self._clock_ms
            self.decoding += 1
            call.program.decoding += 1
            call.program.began_ms += self._clock_ms
            self._decoding[call.key] = call.program
            self.census.decodes(call.presence, self._now)

    def pauses(self, call_id: str, now: float | None = None) -> None:
        """The call lost its place and waits again; `now` as for `prefills`."""
        self._now = self._now if now is None else now
        call = self._calls.get(call_id)
        if call is not None:
            self._stops_decoding(call)
            if call.presence.stage is not Stage.WAITING:
                self.census.pauses(call.presence, self._now)

    def finish(self, call_id: str, now: float) -> tuple[str, float] | None:
        """The call is through: returns its program's key and the length of the path to its end; None if it is not known."""
        self._now = now
        call = self._calls.pop(call_id, None)
        if call is None:
            return None
        self._stops_decoding(call)
        self.census.ends(call.presence, call.key, now)
        program, path_ms = call.program, call.path_ms + call.service_ms
        program.calls -= 1
        program.seen = now
        self.ended += 1
        program.ends(self.ended, call.thread, path_ms)
        if not program.calls:
            self._idle[call.key] = program
        return call.key, path_ms

    def service_ms(self, call_id: str) -> float:
        """Attained service of the call's program."""
        return self.attained_ms(self._calls[call_id].program)

    def attained_ms(self, program: Program) -> float:
        """Attained service of the program."""
        return program.service_ms + program.decoding * self._clock_ms - program.began_ms

    def level(self, call_id: str, now: float) -> int:
        """The level at which the call waits, 0 is the first; 0 too for a call that is not known."""
        self._now = now
        call = self._calls.get(call_id)
        if call is None:
            return 0
        level = self._level(call, now)
        self.census.moves(call.presence, level)
        return level

    def level_of(self, ms: float) -> int:
        """The level of so much service, or of a path of that length."""
        return min(int(log2(max(ms, 0.0) / self._quantum_ms + 1)), self._levels - 1)

    def next_level(self, program: Program) -> int:
        """The level at which its next call would wait."""
        return self.level_of(self.attained_ms(program) if self._policy == "plas" else program.path_ms)

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
        active = self.census.active(limit)
        yield from ((key, self._programs[key]) for key in active)
        yield from islice(reversed(self._idle.items()), limit - len(active))

    def faults(self, known: Container[str]) -> list[str]:
        """What does not balance, `known` being the calls there are; O(programs + calls)."""
        found = [f"the call {name!r} of a program is gone" for name in self._calls if name not in known]
        calls = Counter(id(call.program) for call in self._calls.values())
        decoding = Counter(id(call.program) for call in self._calls.values() if call.decodes_since_ms is not None)
        for key, program in self._programs.items():
            if not program.calls == program.tally.calls == calls[id(program)]:
                counted = f"{program.calls} calls under way, {program.tally.calls} by stage"
                found.append(f"{key!r} counts {counted}, and has {calls[id(program)]}")
            if program.decoding != decoding[id(program)] or (key in self._decoding) != bool(program.decoding):
                found.append(f"{key!r} counts {program.decoding} decoding calls, and has {decoding[id(program)]}")
            if (key in self._idle) == bool(program.calls):
                found.append(f"{key!r} is not where programs with {program.calls} calls are")
            if not program.calls and program.tally.kv_tokens:
                found.append(f"{key!r} has no calls, and holds {program.tally.kv_tokens} tokens")
        levels = Counter(program.service_level for program in self._programs.values())
        if self.by_service != [levels[level] for level in range(self._levels)]:
            found.append("programs are not at the levels that are counted")
        waiting = Counter(c.presence.level for c in self._calls.values() if c.presence.stage is Stage.WAITING)
        if self.census.waiting != [waiting[level] for level in range(self._levels)]:
            found.append("calls do not wait at the levels that are counted")
        return found

    def _level(self, call: Call, now: float) -> int:
        if call.promoted:
            return 0
        enough_ms = self._promote_ratio * max(self.attained_ms(call.program), self._quantum_ms)
        if not call.promoted and self.census.waited_s(call.presence, now) * 1000 > enough_ms:
            call.promoted = True
            self.promotions += 1
        return self._standing(call)

    def standing(self, call_id: str) -> int:
        """The level of a call that has run; with `atlas` what it has received itself counts too, 0 for a promoted one."""
        call = self._calls.get(call_id)
        return 0 if call is None else self._standing(call)

    def _standing(self, call: Call) -> int:
        if call.promoted:
            return 0
        if self._policy == "plas":
            return self.level_of(self.attained_ms(call.program))
        received = self._clock_ms - call.decodes_since_ms if call.decodes_since_ms is not None else 0.0
        return self.level_of(call.path_ms + call.service_ms + received)

    def _look_at(self, program: Program) -> None:
        level = self.level_of(self.attained_ms(program))
        if level != program.service_level:
            self.by_service[program.service_level] -= 1
            self.by_service[level] += 1
            program.service_level = level

    def _stops_decoding(self, call: Call) -> None:
        if call.decodes_since_ms is None:
            return
        program, received = call.program, self._clock_ms - call.decodes_since_ms
        self.decoding -= 1
        program.decoding -= 1
        program.began_ms -= call.decodes_since_ms
        call.decodes_since_ms = None
        call.service_ms += received
        program.service_ms += received
        if not program.decoding:
            del self._decoding[call.key]
        self._look_at(program)

    def _program(self, key: str, now: float) -> Program:
        """The program of that key, which has a call now; a new one where it is not known, or no longer."""
        # With one arrival at a time, the two longest unseen ones are enough to keep the bounds.
        for name in [*islice(self._idle, 2), key]:
            idle = self._idle.get(name)
            if idle and (now - idle.seen > self._ttl_s or (name != key and len(self._programs) > self._capacity)):
                del self._idle[name], self._programs[name]
                self.by_service[idle.service_level] -= 1
        if key not in self._programs:
            self._programs[key] = Program(self.ended)
            self.by_service[0] += 1
        self._idle.pop(key, None)
        return self._programs[key]
