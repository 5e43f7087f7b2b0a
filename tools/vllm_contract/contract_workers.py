"""The part of the contract that the workers of two lanes rely on, and the engines that benchmark and GPU check make."""

from vllm_contract.symbols import calls, exports, overrides, reads, says

CUDA, CPU = "vllm_compat/cuda.py", "vllm_compat/cpu.py"
RUNNER, GRAPHS, WORKER = "vllm_compat/cuda_runner.py", "vllm_compat/cuda_graphs.py", "vllm_compat/cuda_worker.py"
CPU_WORKER = "vllm_compat/cpu_worker.py"
CONNECTOR = "lanes/connector.py"
SAMPLING = "vllm.sampling_params:SamplingParams"
GPU = "vllm.v1.worker.gpu.model_runner"
GPU_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
GPU_WORKER = "vllm.v1.worker.gpu_worker:Worker"
GPU_CONNECTOR = "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector"
SPACE = "vllm.v1.worker.workspace"

WORKERS = (
    # A second CPU worker.
    *calls("vllm.v1.worker.worker_base", CPU, WorkerWrapperBase=""),
    *calls("vllm.v1.worker.worker_base:WorkerWrapperBase", CPU, init_worker="all_kwargs", init_device=""),
    *reads("vllm.v1.worker.worker_base:WorkerWrapperBase", CPU, "worker"),
    *calls(
        "vllm.v1.worker.cpu_worker",
        f"{CPU} {CPU_WORKER}",
        CPUWorker="vllm_config= local_rank= rank= distributed_init_method= is_driver_worker=",
    ),
    *calls("vllm.v1.worker.cpu_worker:CPUWorker", CPU, load_model="", initialize_from_config="kv_cache_config"),
    *reads("vllm.v1.worker.cpu_worker:CPUWorker", f"{CPU} {CPU_WORKER}", "model_runner"),
    # The CPU worker that runs steps of many sizes before the first request; vLLM sets the seeds of random numbers after them.
    *overrides("vllm.v1.worker.cpu_worker:CPUWorker", CPU_WORKER, compile_or_warm_up_model=""),
    # Each layer is given its cache of kernels when the weights are loaded, by these two.
    *overrides("vllm.v1.worker.cpu_worker:CPUWorker", CPU_WORKER, load_model="load_dummy_weights="),
    *calls("vllm._custom_ops", CPU, create_onednn_mm="weight primitive_cache_size"),
    *says("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", CPU, "ops.create_onednn_mm("),
    *reads("vllm.v1.worker.cpu_worker:CPUWorker", CPU_WORKER, "model_config vllm_config"),
    *says(
        "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model",
        CPU_WORKER,
        "len(self.model_runner.kv_caches) == 0",
        "set_random_seed(",
    ),
    *says("vllm.platforms.cpu:CpuPlatform.check_and_update_config", CPU, "if parallel_config.worker_cls == 'auto':"),
    *calls(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        CPU_WORKER,
        _dummy_run="num_tokens skip_eplb= force_attention= create_mixed_batch=",
        _dummy_sampler_run="hidden_states",
    ),
    *says(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run",
        CPU_WORKER,
        "num_decode_tokens = min(max_num_reqs - 1, num_tokens // 2)",
        "[1] * num_decode_tokens + [num_prefill_tokens + 1]",
    ),
    *reads("vllm.v1.worker.gpu_model_runner:GPUModelRunner", CPU_WORKER, "kv_caches"),
    *calls("vllm.v1.worker.cpu_model_runner:CPUModelRunner", f"{CPU} {CPU_WORKER}", get_model=""),
    *calls(
        "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration",
        CPU_WORKER,
        compute_logits="hidden_states",
    ),
    *exports("vllm.distributed", CPU_WORKER, "get_pp_group get_world_group"),
    *calls("vllm.distributed.parallel_state:GroupCoordinator", CPU_WORKER, broadcast_object="obj"),
    *reads("vllm.distributed.parallel_state:GroupCoordinator", CPU_WORKER, "is_last_rank world_size"),
    *calls("vllm.v1.worker.cpu_model_runner:CPUModelRunner", CPU, execute_model="scheduler_output"),
    *reads("vllm.v1.worker.cpu_model_runner:CPUModelRunner", CPU, "execute_model_state"),
    *calls("vllm.v1.worker.cpu_model_runner", f"{CPU} {CPU_WORKER}", _set_global_compilation_settings="config"),
    *says("vllm.v1.worker.utils:allocate_kv_cache", CPU, "torch.zeros(buf_size, dtype=torch.int8"),
    # A second GPU worker. `init_kv_cache` is replaced meanwhile, so it must be looked up in the module.
    *exports(GPU, RUNNER, "GPUModelRunner init_kv_cache"),
    *calls(
        f"{GPU}:GPUModelRunner",
        RUNNER,
        __init__="vllm_config device",
        load_model="model=",
        initialize_kv_cache="kv_cache_config is_profiling=",
        execute_model="scheduler_output",
        postprocess_num_computed_tokens="input_batch",
        _dummy_run="num_tokens uniform_decode= skip_eplb= is_profile=",
        _dummy_sampler_run="hidden_states",
    ),
    *overrides(f"{GPU}:GPUModelRunner", RUNNER, execute_model="scheduler_output dummy_run= ...", sample_tokens="..."),
    *reads(f"{GPU}:GPUModelRunner", RUNNER, "block_tables cudagraph_manager device execute_model_state kv_caches"),
    *reads(f"{GPU}:GPUModelRunner", RUNNER, "main_stream max_num_reqs req_states"),
    *reads(f"{GPU}:GPUModelRunner", f"{RUNNER} lanes/cuda/provider.py", "max_model_len"),
    *reads(f"{GPU}:GPUModelRunner", "lanes/cuda/provider.py", "max_num_tokens"),
    *calls(f"{GPU}:GPUModelRunner", f"{RUNNER} {CUDA}", get_model=""),
    *reads(f"{GPU}:GPUModelRunner", CUDA, "attn_groups"),
    *reads(f"{GPU}:ExecuteModelState", RUNNER, "input_batch"),
    *calls("vllm.v1.worker.gpu.states:RequestState", RUNNER, apply_staged_writes=""),
    *calls("vllm.v1.worker.gpu.block_table:BlockTables", RUNNER, apply_staged_writes=""),
    *reads("vllm.v1.worker.gpu.block_table:BlockTables", RUNNER, "block_sizes"),
    *reads("vllm.v1.worker.utils:AttentionGroup", CUDA, "backend"),
    *calls("vllm.v1.attention.backend:AttentionBackend", CUDA, get_name=""),
    *calls("vllm.model_executor.offloader", RUNNER, get_offloader="", set_offloader="instance"),
    *says(
        f"{GPU}:GPUModelRunner.initialize_kv_cache",
        RUNNER,
        "kv_caches_dict = init_kv_cache(",
        "self.kv_connector = NO_OP_KV_CONNECTOR",
    ),
    # The connector makes the lane: by then there are KV caches and a graph manager, and nothing is captured yet.
    *says(
        f"{GPU}:GPUModelRunner.initialize_kv_cache",
        "lanes/cuda/provider.py",
        "self.cudagraph_manager =\nget_kv_connector(",
        "self.kv_caches =\nget_kv_connector(",
    ),
    *says(f"{GPU}:GPUModelRunner.main_stream", RUNNER, "functools.cached_property"),
    *says(f"{GPU}:GPUModelRunner.load_model", RUNNER, "self.model = model or "),
    *says(f"{GPU}:GPUModelRunner.__init__", RUNNER, "set_offloader(create_offloader("),
    # `main_stream` may be set, and decides where results are copied from and which stream is current then.
    *says(f"{GPU}:GPUModelRunner.sample_tokens", RUNNER, "main_stream=self.main_stream"),
    *says(
        f"{GPU}:GPUModelRunner.execute_model",
        GRAPHS,
        "self.cudagraph_manager.run_fullgraph(batch_desc)",
        "need_eager=is_profile",
    ),
    *overrides(f"{GPU_GRAPHS}:CudaGraphManager", GRAPHS, capture="...", _capture_stream="desc"),
    *overrides(f"{GPU_GRAPHS}:CudaGraphManager", GRAPHS, dispatch="num_reqs num_tokens ..."),
    *reads(f"{GPU_GRAPHS}:CudaGraphManager", GRAPHS, "_capture_descs graphs"),
    *reads(f"{GPU_GRAPHS}:BatchExecutionDescriptor", GRAPHS, "cg_mode max_query_len num_reqs num_tokens num_ubatches"),
    *reads(f"{GPU_GRAPHS}:BatchExecutionDescriptor", GRAPHS, "uniform_token_count"),
    *says(
        f"{GPU_GRAPHS}:CudaGraphManager.capture",
        GRAPHS,
        "stream=self._capture_stream(desc)",
        "self.graphs[desc] = graph",
        "self._capture_descs[mode]",
    ),
    *says(f"{GPU_GRAPHS}:CudaGraphManager.run_fullgraph", GRAPHS, "self.graphs[desc].replay()"),
    # The slots' graphs write where the others do, not to memory that the first capture allocated for itself.
    *says(f"{GPU_GRAPHS}:ModelCudaGraphManager.capture.store_capture_output", GRAPHS, "if self.hidden_states is None:"),
    *overrides(GPU_WORKER, WORKER, init_device="", _make_model_runner="", determine_available_memory=""),
    *overrides(GPU_WORKER, WORKER, compile_or_warm_up_model=""),
    # The forward pass of the profile has ended when it samples, and this call is looked up on the instance.
    *says(
        f"{GPU}:GPUModelRunner.profile_run",
        "vllm_compat/cuda_memory.py",
        "self._dummy_run(\nself._dummy_sampler_run(sample_hidden_states)",
    ),
    *calls(f"{GPU}:GPUModelRunner", "vllm_compat/cuda_memory.py", capture_model=""),
    *reads(GPU_WORKER, WORKER, "model_runner"),
    *reads(GPU_WORKER, WORKER, "cache_config cudagraph_memory_estimate peak_activation_memory"),
    *says(
        f"{GPU_WORKER}._init_workspace_and_model_runner",
        WORKER,
        "init_workspace_manager(\nself._make_model_runner()",
    ),
    *says(
        f"{GPU_WORKER}.determine_available_memory",
        WORKER,
        "maybe_apply_startup_plan(self)",
        "self.peak_activation_memory =",
        "profile_result.transient_peak_headroom + cudagraph_memory_estimate_applied",
        "self.cudagraph_memory_estimate = cudagraph_memory_estimate",
    ),
    *calls(SPACE, f"{WORKER} {CUDA}", current_workspace_manager=""),
    *calls(SPACE, WORKER, WorkspaceManager="device num_ubatches num_lanes alloc_context"),
    *calls(SPACE, RUNNER, use_workspace_lane="lane"),
    *exports(SPACE, WORKER, "_manager"),
    *reads(f"{SPACE}:WorkspaceManager", f"{WORKER} {CUDA}", "_num_lanes"),
    *reads(f"{SPACE}:WorkspaceManager", WORKER, "_alloc_context _device _num_ubatches"),
    # Jobs start behind the step: `start_load_kv` comes after it, and before the outcomes are asked for.
    *says(f"{GPU_CONNECTOR}.pre_forward", CONNECTOR, "handle_preemptions("),
    *says(f"{GPU_CONNECTOR}.post_forward", CONNECTOR, "self._start_load_kv()"),
    *says(f"{GPU_CONNECTOR}.no_forward", CONNECTOR, "self.post_forward("),
    # The sampled tokens are on their way to the host before the next chunk is launched in the same thread.
    *says(f"{GPU}:GPUModelRunner.sample_tokens", CONNECTOR, "AsyncOutput(\nself.kv_connector.post_forward("),
    *says(
        "vllm.model_executor.layers.attention.kv_transfer_utils:maybe_transfer_kv_layer",
        RUNNER,
        "not has_kv_transfer_group()",
    ),
    # Benchmark and GPU check: engines in their own process.
    *exports("vllm", "simulator/agreement.py gpucheck/engines.py", "LLM"),
    *exports("vllm", "bench/closed_loop.py simulator/calibration.py gpucheck/scripted_requests.py", "SamplingParams"),
    *reads(SAMPLING, "gpucheck/scripted_requests.py", "detokenize ignore_eos logprobs max_tokens temperature"),
    *reads(
        "vllm.entrypoints.llm:LLM",
        "simulator/agreement.py gpucheck/faults.py gpucheck/pressure_engine.py",
        "llm_engine",
    ),
    *reads("vllm.v1.engine.llm_engine:LLMEngine", "gpucheck/pressure_engine.py", "vllm_config"),
    *reads("vllm.config:CacheConfig", "gpucheck/pressure_engine.py", "num_gpu_blocks"),
    *calls("vllm.entrypoints.llm:LLM", "gpucheck/faults.py", reset_prefix_cache=""),
    *calls(
        "vllm.v1.engine.llm_engine:LLMEngine",
        "bench/closed_loop.py simulator/calibration.py gpucheck/scripted_requests.py",
        add_request="request_id prompt params session_id=",
    ),
    *calls(
        "vllm.v1.engine.llm_engine:LLMEngine",
        "bench/closed_loop.py simulator/calibration.py gpucheck/scripted_requests.py gpucheck/pressure_engine.py",
        step="",
    ),
    *calls(
        "vllm.v1.engine.llm_engine:LLMEngine",
        "simulator/calibration.py gpucheck/scripted_requests.py",
        abort_request="request_ids",
    ),
    *calls("vllm.v1.engine.llm_engine:LLMEngine", "simulator/calibration.py", has_unfinished_requests=""),
    *reads("vllm.v1.engine.llm_engine:LLMEngine", "simulator/agreement.py", "engine_core"),
    *reads("vllm.v1.engine.core_client:InprocClient", "simulator/agreement.py", "engine_core"),
    *reads("vllm.v1.engine.core:EngineCore", "simulator/agreement.py vllm_compat/control.py", "scheduler"),
    *reads("vllm.outputs:RequestOutput", "bench/closed_loop.py", "num_cached_tokens outputs request_id"),
    *reads("vllm.outputs:RequestOutput", "gpucheck/scripted_requests.py", "finished"),
    *reads("vllm.outputs:CompletionOutput", "bench/closed_loop.py gpucheck/scripted_requests.py", "token_ids"),
    *reads("vllm.outputs:CompletionOutput", "gpucheck/scripted_requests.py", "index logprobs stop_reason text"),
)
