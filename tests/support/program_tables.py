"""Program tables for tests: small levels, a short quantum."""

from vllm_agentserve.policy.programs import ProgramTable


def table(policy: str = "plas", **given: float) -> ProgramTable:
    return ProgramTable(policy, **{"levels": 4, "quantum_ms": 100.0, "promote_ratio": 10.0} | given)  # type: ignore[arg-type]
