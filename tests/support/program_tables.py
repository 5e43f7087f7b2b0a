"""Program tables for tests: small levels, a short quantum, and calls by their names."""

from typing import Any

from tests.support.calls import call_of
from vllm_agentserve.policy.call import Call, Chunk
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.program import Program
from vllm_agentserve.policy.programs import ProgramTable


class NamedTable:
    """A program table that is told names instead of calls; unknown ones are calls that never arrived."""

    def __init__(self, table: ProgramTable) -> None:
        self.table = table
        self.calls: dict[str, Call] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, name: str) -> bool:
        return name in self.calls

    def call(self, name: str) -> Call:
        return self.calls.get(name) or call_of(name)

    def arrive(self, name: str, *given: Any, **named: Any) -> None:
        self.calls[name] = call_of(name)
        self.table.arrive(self.calls[name], *given, **named)

    def charge(self, name: str, ms: float) -> None:
        self.table.charge(self.call(name), ms)

    def prefills(
        self, name: str, resume: bool, prompt_tokens: int, before: int, tokens: int, now: float | None = None
    ) -> None:
        phase = Phase.RESUME_PREFILL if resume else Phase.COLD_PREFILL
        self.table.prefills(self.call(name), prompt_tokens, Chunk(phase, tokens, before), now)

    def decodes(self, name: str) -> None:
        self.table.decodes(self.call(name))

    def pauses(self, name: str, now: float | None = None) -> None:
        self.table.pauses(self.call(name), now)

    def finish(self, name: str, now: float) -> tuple[str, float] | None:
        ended = self.table.finish(self.call(name), now)
        self.calls.pop(name, None)
        return ended

    def level(self, name: str, now: float) -> int:
        """The level at which a call waits, brought up to date."""
        call = self.call(name)
        self.table.update_level(call, now)
        return call.program.level if call.program is not None else 0

    def standing(self, name: str) -> int:
        return self.table.standing(self.call(name))

    def program(self, name: str) -> Program:
        """The program of a call."""
        part = self.calls[name].program
        assert part is not None
        return part.program

    def service_ms(self, name: str) -> float:
        """Attained service of the call's program."""
        return self.table.attained_ms(self.program(name))

    def active(self, limit: int) -> list[str]:
        """The programs with calls under way, the one whose latest call came last first."""
        return [key for key, program in self.table.shown(limit) if program.calls]

    def faults(self, known: Any = None) -> list[str]:
        return self.table.faults(self.calls.values())


def table(policy: str = "plas", **given: float) -> NamedTable:
    options = {"levels": 4, "quantum_ms": 100.0, "promote_ratio": 10.0} | given
    return NamedTable(ProgramTable(policy, **options))  # type: ignore[arg-type]
