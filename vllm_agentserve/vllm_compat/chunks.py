"""A chunk of the prefill lane as vLLM's model runners take their work: a scheduled step of one request."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_agentserve.policy.jobs import JobChunk


def scheduled(chunk: "JobChunk", finished: set[str], sampling: Any = None) -> Any:
    """The `SchedulerOutput` of a step that computes this chunk and nothing else.

    Args:
        chunk: the first one of a job brings its tokens and blocks, later ones go on with them.
        finished: requests the runner can forget.
        sampling: vLLM's `SamplingParams`, where the runner wants them.
    """
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    output, job = SchedulerOutput.make_empty(), chunk.job
    if chunk.first:
        output.scheduled_new_reqs = [
            NewRequestData(
                req_id=job.request_id,
                prompt_token_ids=job.token_ids,
                mm_features=[],
                sampling_params=sampling,
                pooling_params=None,
                block_ids=job.block_ids,
                num_computed_tokens=chunk.position,
                lora_request=None,
                prefill_token_ids=job.token_ids,
            )
        ]
    else:
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=[job.request_id],
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None],
            num_computed_tokens=[chunk.position],
            num_output_tokens=[0],
        )
    return replace(
        output,
        num_scheduled_tokens={job.request_id: chunk.tokens},
        total_num_scheduled_tokens=chunk.tokens,
        finished_req_ids=finished,
    )
