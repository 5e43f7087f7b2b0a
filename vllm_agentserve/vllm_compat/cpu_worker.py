"""The worker class on CPUs (`--worker-cls`); imports vLLM's, so only a worker's process imports it."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from vllm import envs
from vllm.distributed import get_pp_group, get_world_group
from vllm.logger import init_logger
from vllm.v1.worker.cpu_model_runner import _set_global_compilation_settings
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.policy.step_sizes import EVERY_SIZE_TO, KERNELS_PER_LAYER, StepSize, step_sizes
from vllm_agentserve.vllm_compat import cpu
from vllm_agentserve.vllm_compat.lanes import local_worker_half
from vllm_agentserve.vllm_compat.weights import has_connector

logger = init_logger("vllm.agentserve")


class WarmCpuWorker(CPUWorker):
    """vLLM's CPU worker, which before the first request runs a step of every size that service will often have.

    oneDNN makes its kernels for each number of tokens when it first meets it: 1 ms to 3 ms for small steps, and more for large
    ones. vLLM's own warm-up on CPUs compiles the model, if it does, and runs one size. All steps run on all threads, since a
    kernel never uses more threads than it was made on, see `policy.step_sizes.KernelSizes`.

    Retired by: sizes to warm up as an option of vLLM's CPU worker.
    """

    warmed_up: tuple[int, ...] = ()
    """Tokens of the steps that were run."""
    _limit_s = 0.0

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        # Beside a lane a kernel that was dropped would be made again on fewer threads.
        with cpu.kernels_kept(KERNELS_PER_LAYER) if has_connector(self.vllm_config) else nullcontext():
            super().load_model(load_dummy_weights=load_dummy_weights)

    def compile_or_warm_up_model(self) -> Any:
        done, failed = [], False
        try:
            steps = self._steps_to_run()
        except Exception:
            self._say_failed()
            steps = []
        if steps:
            self._sample_once()
        began = time.monotonic()
        for tokens in steps:
            # One that has failed goes on agreeing with the others on when to end: what they send each other is not told apart.
            if not failed:
                try:
                    self._run(tokens)
                    done.append(tokens)
                except Exception:
                    self._say_failed()
                    failed = True
            if self._enough(began, failed):
                break
        self.warmed_up = tuple(done)
        if done:
            logger.info(
                "agentserve: %d of %d sizes of steps were run once, in %.1f s ('warm_up_s').",
                len(done),
                len(steps),
                time.monotonic() - began,
            )
        # Afterwards, since vLLM sets the seeds of its random numbers at its end.
        return super().compile_or_warm_up_model()

    def _say_failed(self) -> None:
        logger.warning("agentserve: a step of the warm-up failed; the engine starts without the rest.", exc_info=True)

    def _steps_to_run(self) -> list[int]:
        """Tokens of each step, small steps first."""
        options = AgentServeConfig.from_additional_config(self.vllm_config.additional_config)
        self._limit_s = 0.0 if envs.VLLM_CPU_CI_ENV else options.warm_up_s
        if not self._limit_s or not self.model_runner.kv_caches or self.model_config.runner_type != "generate":
            return []
        largest = self.vllm_config.scheduler_config.max_num_batched_tokens
        # A longer prompt than the model takes has more KV blocks than vLLM's tables have room for, and is read beyond their ends.
        longest = self.model_config.max_model_len - 1
        every_size = step_sizes(largest, options.chunk_granularity_tokens)
        return [size for size in every_size if self._prompt_tokens(size) <= longest]

    def _sample_once(self) -> None:
        """Draws tokens for one request, and for two: vLLM compiles what draws when it first does either, whatever its flags."""
        try:
            for requests in range(1, min(self.vllm_config.scheduler_config.max_num_seqs, 2) + 1):
                last = self._step(requests, decodes=True)
                if get_pp_group().is_last_rank:
                    self.model_runner._dummy_sampler_run(last)
        except Exception as error:
            logger.warning("agentserve: drawing tokens failed in the warm-up: %s", error)

    def _prompt_tokens(self, tokens: int) -> int:
        """Tokens of the prompt in a step of so many, as vLLM's dummy step divides them; 0 where all of them are decodes."""
        requests = self.vllm_config.scheduler_config.max_num_seqs
        return 0 if tokens <= min(requests, EVERY_SIZE_TO) else tokens - min(requests - 1, tokens // 2)

    def _run(self, tokens: int) -> None:
        """Runs a step: decodes alone where there are places for so many, or else beside a prompt."""
        decodes = not self._prompt_tokens(tokens)
        half = local_worker_half()
        if half is not None:
            half.warms_up(StepSize(tokens, tokens if decodes else 0))
        last = self._step(tokens, decodes)
        if decodes and get_pp_group().is_last_rank:
            with torch.inference_mode():
                self.model_runner.get_model().compute_logits(last)

    def _step(self, tokens: int, decodes: bool) -> Any:
        """Runs a step that writes no KV; returns the hidden states of each request's last token."""
        runner: Any = self.model_runner
        with _set_global_compilation_settings(self.vllm_config):
            _, last = runner._dummy_run(tokens, skip_eplb=True, force_attention=True, create_mixed_batch=not decodes)
        return last

    def _enough(self, began: float, failed: bool) -> bool:
        """Whether the time is over, or there are no more steps; the same on all workers, which compute each step together."""
        enough = failed or time.monotonic() - began >= self._limit_s
        group = get_world_group()
        return bool(group.broadcast_object(enough)) if group.world_size > 1 else enough
