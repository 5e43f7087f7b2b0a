"""Agents whose contexts do not fit into a KV cache of 33 blocks, against an engine in this process."""

from dataclasses import replace

from vllm import LLM

from vllm_agentserve.bench.closed_loop import ClosedLoop
from vllm_agentserve.bench.drawing import WorkloadOptions, draw_sessions
from vllm_agentserve.bench.records import Record
from vllm_agentserve.bench.workloads import Uniform, around, find_workload

TURNS, BLOCKS = 4, 34
"""Contexts of about 900 tokens at their ends, which are 7.5 blocks of 128 tokens; vLLM keeps one of the blocks to itself."""
WORKLOAD = replace(
    find_workload("pressure"),
    turns=Uniform(TURNS, TURNS),
    system=Uniform(400, 500),
    result=Uniform(60, 120),
    answer=Uniform(16, 16),
    tool_s=around(0.2),
)


def run_agents(llm: LLM, agents: int, rounds: int = 1) -> list[Record]:
    """The same agents in every engine; other ones in every round."""
    records: list[Record] = []
    for number in range(rounds):
        sessions = draw_sessions(WORKLOAD, WorkloadOptions(agents=agents), number)
        records += ClosedLoop(llm.llm_engine, sessions, "", number, told=True, suffix=f"@{number}").run()
    return records


def contexts(records: list[Record]) -> dict[tuple[int, str, int], str]:
    """What each call was sent: all answers before it are part of that."""
    return {(record.round, record.session, record.turn): record.prompt for record in records}
