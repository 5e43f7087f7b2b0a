"""Every part of vLLM that this package uses, public or not, and where: what `make compat` looks for in another version.

Imports neither vLLM nor torch. A symbol is found by reading sources (`sources.py`), so what counts as an attribute of a class is
a property, an assignment in the body of the class or of one of its bases, or `self.NAME = ...` in one of their methods.
"""

from vllm_contract.contract_host import HOST_MEMORY
from vllm_contract.contract_shared import SHARED_STATE
from vllm_contract.contract_workers import WORKERS
from vllm_contract.symbols import calls, exports, implements, overrides, reads, says

SCHED, COMPAT, DISPATCH = "scheduler/scheduler.py", "vllm_compat/scheduler.py", "lanes/connector_scheduler.py"
HOOKS, LANES, CUDA, CPU = "vllm_compat/hooks.py", "vllm_compat/lanes.py", "vllm_compat/cuda.py", "vllm_compat/cpu.py"
RUNNER, GRAPHS, WORKER = "vllm_compat/cuda_runner.py", "vllm_compat/cuda_graphs.py", "vllm_compat/cuda_worker.py"
CPU_WORKER = "vllm_compat/cpu_worker.py"
CHUNKS, QUEUES, METRICS = "vllm_compat/chunks.py", "scheduler/waiting.py", "scheduler/metrics.py"
CONNECTOR, ASKED = "lanes/connector.py", "scheduler/vllm_hooks.py"
HOST = "vllm_compat/host.py"
SHARED, WEIGHTS = "vllm_compat/shared_state.py", "vllm_compat/weights.py"
BOOKS, BALANCE = "vllm_compat/integrity.py", "scheduler/integrity.py"

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
REQUEST = "vllm.v1.request:Request"
QUEUE = "vllm.v1.core.sched.request_queue:RequestQueue"
OUTPUT = "vllm.v1.core.sched.output"
CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1.base"
CONTROL = "vllm_compat/control.py"
FREE, LEDGER = "vllm_compat/free_blocks.py", "kv/ledger.py"
FREE_QUEUE = "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue"
LAUNCH = "vllm_compat/cuda_launch.py"
STATE = "vllm.distributed.kv_transfer.kv_transfer_state"
LOGGERS = "vllm.v1.metrics.loggers"
ARGS = "vllm.engine.arg_utils:EngineArgs"
CONFIG = "vllm.config:VllmConfig"
SAMPLING = "vllm.sampling_params:SamplingParams"

CONTRACT = (
    # NIXL's own class, looked up when it is first used.
    *exports("vllm.distributed.nixl_utils", "vllm_compat/nixl.py", "NixlWrapper"),
    *exports("vllm.v1.core.sched.scheduler", f"{SCHED} {COMPAT}", "Scheduler"),
    *exports("vllm.v1.core.sched.async_scheduler", SCHED, "AsyncScheduler"),
    *overrides(
        SCHEDULER,
        SCHED,
        __init__="vllm_config ...",
        schedule="throttle_prefills",
        update_from_output="scheduler_output model_runner_output",
        reset_prefix_cache="reset_running_requests reset_connector",
        add_request="request",
        _preempt_request="request ...",
        _free_request="request ...",
        _handle_stopped_request="request",
        _handle_blocked_waiting_request="request",
        set_pause_state="pause_state",
    ),
    # A request that is not ready is passed over, and those behind it are looked at.
    *says(
        f"{SCHEDULER}.schedule",
        SCHED,
        "ready_to_schedule = self._handle_blocked_waiting_request(request)",
        "skip_request(request_queue)",
    ),
    # A request that has stopped, and is no streamed session, has ended; a session is no longer in `running`.
    *says(f"{SCHEDULER}._handle_stopped_request", SCHED, "if not request.resumable:", "return True"),
    *calls(
        SCHEDULER,
        COMPAT,
        _preempt_request="request timestamp",
        _request_blocks_can_be_freed="request",
        _update_from_kv_xfer_finished="kv_connector_output",
        _handle_failed_recving="failed_req_ids",
        _handle_blocked_waiting_request="request",
    ),
    *overrides(SCHEDULER, COMPAT, _reserve_prefill_lookahead="request num_computed_tokens num_new_tokens"),
    # The two seams: vLLM asks the attribute of the instance, and everything that waits is in `waiting`.
    *says(f"{SCHEDULER}.schedule", f"{SCHED} {COMPAT}", "self._reserve_prefill_lookahead(", "self.waiting"),
    *says(f"{SCHEDULER}.schedule", QUEUES, "self.waiting.prepend_requests(step_skipped_waiting)"),
    *says(f"{SCHEDULER}._preempt_request", "scheduler/features/preemption.py", "self.waiting.prepend_request(request)"),
    *reads(SCHEDULER, SCHED, "cache_config kv_holding_waiting log_stats max_num_scheduled_tokens num_spec_tokens"),
    *reads(SCHEDULER, SCHED, "parallel_config"),
    *reads(SCHEDULER, f"{SCHED} {COMPAT} {HOST}", "vllm_config"),
    *reads(SCHEDULER, f"{SCHED} {BALANCE}", "waiting"),
    *reads(SCHEDULER, BOOKS, "deferred_frees"),
    *reads(SCHEDULER, f"{SCHED} scheduler/features/preemption.py", "current_step"),
    *reads(SCHEDULER, f"{SCHED} {COMPAT} {BALANCE} scheduler/features/preemption.py", "running"),
    *reads(SCHEDULER, f"{SCHED} {COMPAT} {BOOKS} {BALANCE}", "requests"),
    *reads(SCHEDULER, COMPAT, "block_size connector_prefix_cache_stats is_encoder_decoder"),
    *reads(SCHEDULER, f"{COMPAT} {HOST}", "connector"),
    *reads(SCHEDULER, f"{COMPAT} {BOOKS}", "kv_cache_manager"),
    *reads(SCHEDULER, COMPAT, "finished_recving_kv_req_ids"),
    # What a reset under running requests would wait for, see `reset_obstacle`.
    *reads(SCHEDULER, COMPAT, "defer_block_free processed_step_seq sched_step_seq"),
    *says(f"{SCHEDULER}._request_blocks_can_be_freed", COMPAT, "request.last_sched_seq <= self.processed_step_seq"),
    *reads(SCHEDULER, COMPAT, "max_num_running_reqs need_mamba_block_aligned_split num_sampled_tokens_per_step"),
    *reads(SCHEDULER, COMPAT, "max_num_active_reqs num_waiting_for_streaming_input pause_state"),
    # How vLLM counts the places that are taken, see `free_places`; a further limit would stand here.
    *says(
        f"{SCHEDULER}.schedule",
        COMPAT,
        "self._pause_state == PauseState.UNPAUSED",
        "num_running = len(self.running) + self.num_waiting_for_streaming_input\n",
        "if num_running >= self.max_num_active_reqs:\n",
    ),
    *exports("vllm.v1.core.sched.interface", COMPAT, "PauseState"),
    *reads("vllm.v1.core.sched.interface:PauseState", COMPAT, "UNPAUSED"),
    *reads(SCHEDULER, COMPAT, "requires_kv_delivery scheduler_config"),
    *calls(
        "vllm.v1.core.kv_cache_manager:KVCacheManager", COMPAT, free="request", prefix_cache_lookup_enabled="request"
    ),
    *reads("vllm.v1.core.kv_cache_manager:KVCacheManager", f"{COMPAT} {BOOKS}", "block_pool coordinator"),
    *reads("vllm.v1.core.kv_cache_manager:KVCacheManager", COMPAT, "watermark_blocks"),
    # For waiting requests only, and only while others run.
    *says(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        COMPAT,
        "if has_scheduled_reqs and request.status in (",
        "watermark_blocks = self.watermark_blocks",
    ),
    *calls(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator",
        COMPAT,
        find_longest_cache_hit="block_hashes max_cache_hit_length",
    ),
    *calls("vllm.v1.core.block_pool:BlockPool", f"{COMPAT} {BOOKS}", get_num_free_blocks=""),
    *reads("vllm.v1.core.block_pool:BlockPool", BOOKS, "blocks cached_block_hash_to_block"),
    *reads("vllm.v1.core.block_pool:BlockPool", f"{BOOKS} {FREE}", "free_block_queue"),
    *calls("vllm.v1.core.block_pool:BlockHashToBlockMap", BOOKS, contain="key block_id"),
    *calls(
        "vllm.v1.core.kv_cache_utils", COMPAT, get_max_concurrency_for_kv_cache_config="vllm_config kv_cache_config"
    ),
    *reads("vllm.v1.kv_cache_interface:KVCacheConfig", COMPAT, "kv_cache_groups num_blocks"),
    *reads("vllm.v1.kv_cache_interface:KVCacheGroupSpec", COMPAT, "kv_cache_spec layer_names"),
    *reads("vllm.v1.kv_cache_interface:KVCacheSpec", COMPAT, "page_size_bytes"),
    # Where vLLM puts the size of its host memory.
    *says("vllm.config:VllmConfig._post_init_kv_transfer_config", COMPAT, "cpu_bytes_to_use"),
    *reads("vllm.config:ParallelConfig", COMPAT, "world_size"),
    *reads(SCHEDULER, COMPAT, "max_model_len"),
    *reads(SCHEDULER, f"{COMPAT} {HOST}", "kv_cache_config"),
    *calls("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue", BOOKS, get_all_free_blocks=""),
    *reads("vllm.v1.core.kv_cache_utils:KVCacheBlock", BOOKS, "is_null"),
    *reads("vllm.v1.core.kv_cache_utils:KVCacheBlock", f"{BOOKS} {LEDGER}", "block_id ref_cnt"),
    *reads("vllm.v1.core.kv_cache_utils:KVCacheBlock", f"{BOOKS} {FREE}", "block_hash"),
    *exports("vllm.v1.core.kv_cache_utils", FREE, "FreeKVCacheBlockQueue KVCacheBlock"),
    *overrides(
        FREE_QUEUE,
        FREE,
        popleft="",
        popleft_n="n",
        append_n="blocks",
        get_all_free_blocks="",
        iter_blocks_after="cursor",
    ),
    # What is not overridden works on kept blocks as well: a block is taken out of whatever list it is in.
    *says(f"{FREE_QUEUE}.remove", FREE, "prev_block.next_free_block = next_block", "self.num_free_blocks -= 1"),
    *says(f"{FREE_QUEUE}.append_n", FREE, "self.fake_free_list_tail", "self.num_free_blocks += len(blocks)"),
    *reads(FREE_QUEUE, FREE, "fake_free_list_head fake_free_list_tail num_free_blocks"),
    *reads(
        "vllm.v1.core.kv_cache_utils:KVCacheBlock",
        f"{FREE} {LEDGER}",
        "prev_free_block next_free_block",
    ),
    *reads("vllm.v1.core.kv_cache_utils:KVCacheBlock", LEDGER, "block_hash_num_tokens"),
    # Blocks with contents are appended together when a request ends, the end of its context first.
    *says(
        "vllm.v1.core.block_pool:BlockPool.free_blocks", FREE, "self.free_block_queue.append_n(blocks_to_evict_last)"
    ),
    *reads("vllm.v1.core.block_pool:BlockPool", f"{COMPAT} {FREE}", "num_gpu_blocks"),
    *reads("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager", FREE, "block_size"),
    *reads("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator", f"{BOOKS} {FREE}", "single_type_managers"),
    *reads("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager", f"{BOOKS} {FREE}", "req_to_blocks"),
    *exports("vllm.v1.request", f"{QUEUES} {SCHED}", "Request"),
    *reads(REQUEST, f"{SCHED} {COMPAT} {QUEUES} {DISPATCH} {BALANCE} policy/call.py", "request_id"),
    *reads(REQUEST, f"{SCHED} {COMPAT} policy/call.py policy/engine.py", "num_computed_tokens"),
    *reads(REQUEST, f"{SCHED} {COMPAT} {BALANCE}", "status"),
    *reads(
        REQUEST,
        f"{SCHED} {COMPAT} {HOST} {DISPATCH} policy/call.py policy/engine.py policy/program_order.py",
        "num_tokens",
    ),
    *reads(REQUEST, f"{SCHED} {COMPAT} {LANES}", "sampling_params"),
    *reads(REQUEST, SCHED, "is_prefill_chunk"),
    *reads(REQUEST, COMPAT, "streaming_queue"),
    *calls(REQUEST, BALANCE, is_finished=""),
    *reads(REQUEST, f"{COMPAT} {HOST} {DISPATCH} policy/attribution.py", "block_hashes"),
    *reads(REQUEST, f"{COMPAT} {LANES}", "has_encoder_inputs"),
    *reads(REQUEST, COMPAT, "resumable"),
    *reads(REQUEST, COMPAT, "kv_transfer_params num_stale_output_tokens"),
    *reads(REQUEST, HOST, "skip_reading_prefix_cache"),
    *reads(REQUEST, f"{COMPAT} policy/attribution.py", "num_output_tokens"),
    *reads(REQUEST, f"{SCHED} {COMPAT} {LANES} policy/call.py", "lora_request"),
    *reads("vllm.lora.request:LoRARequest", f"{SCHED} {COMPAT}", "lora_int_id"),
    *reads(SCHEDULER, COMPAT, "lora_config"),
    *reads("vllm.config.lora:LoRAConfig", COMPAT, "max_loras"),
    *says(f"{SCHEDULER}.schedule", COMPAT, "len(scheduled_loras) == self.lora_config.max_loras"),
    # A request whose grammar is being compiled is looked at again only in a step.
    *reads(REQUEST, COMPAT, "structured_output_request"),
    *reads("vllm.v1.structured_output.request:StructuredOutputRequest", COMPAT, "grammar"),
    *says(f"{SCHEDULER}._handle_blocked_waiting_request", COMPAT, "struct_output_req.grammar is None"),
    # The last of `running` is preempted, and running requests are asked for in this order.
    *says(
        f"{SCHEDULER}.schedule",
        "policy/step_order.py",
        "preempted_req = self.running[-1]",
        "request = self.running[req_index]",
    ),
    *reads(REQUEST, LANES, "prompt_embeds"),
    *reads(REQUEST, "policy/call.py", "cache_salt"),
    *reads("vllm.lora.request:LoRARequest", "policy/call.py", "lora_name"),
    *reads(REQUEST, f"{DISPATCH} policy/attribution.py", "all_token_ids"),
    *reads(REQUEST, f"{DISPATCH} policy/attribution.py policy/program_order.py", "num_prompt_tokens"),
    *reads(REQUEST, "policy/attribution.py", "prompt_token_ids"),
    *reads(REQUEST, "policy/call.py", "session_id"),
    *reads(REQUEST, DISPATCH, "num_preemptions prefill_stats"),
    *calls(
        "vllm.v1.metrics.stats:PrefillStats",
        DISPATCH,
        set="num_prompt_tokens num_local_cached_tokens num_external_cached_tokens",
    ),
    *exports("vllm.v1.request", f"{SCHED} {COMPAT} {BALANCE}", "RequestStatus"),
    *reads("vllm.v1.request:RequestStatus", SCHED, "RUNNING"),
    *reads("vllm.v1.request:RequestStatus", f"{SCHED} {COMPAT} {BALANCE}", "PREEMPTED"),
    *reads("vllm.v1.request:RequestStatus", f"{SCHED} {COMPAT} {BALANCE}", "WAITING WAITING_FOR_STREAMING_REQ"),
    *implements(
        QUEUE,
        QUEUES,
        "add_request pop_request peek_request prepend_request prepend_requests remove_request remove_requests __bool__ __len__ "
        "__iter__",
    ),
    *overrides(
        QUEUE,
        QUEUES,
        add_request="request",
        pop_request="",
        peek_request="",
        prepend_request="request",
        prepend_requests="requests",
        remove_request="request",
        remove_requests="requests",
    ),
    *exports(OUTPUT, f"{SCHED} {CHUNKS} {CONNECTOR}", "SchedulerOutput"),
    *calls(f"{OUTPUT}:SchedulerOutput", CHUNKS, make_empty=""),
    *reads(f"{OUTPUT}:SchedulerOutput", f"{SCHED} {CHUNKS}", "num_scheduled_tokens scheduled_cached_reqs"),
    *reads(f"{OUTPUT}:SchedulerOutput", f"{SCHED} {CHUNKS}", "scheduled_new_reqs"),
    *reads(f"{OUTPUT}:SchedulerOutput", CHUNKS, "finished_req_ids"),
    *reads(f"{OUTPUT}:SchedulerOutput", f"{CHUNKS} {CONNECTOR}", "total_num_scheduled_tokens"),
    *reads(f"{OUTPUT}:SchedulerOutput", RUNNER, "kv_connector_metadata"),
    *reads(f"{OUTPUT}:NewRequestData", SCHED, "req_id"),
    *reads(f"{OUTPUT}:CachedRequestData", SCHED, "resumed_req_ids"),
    *calls(
        OUTPUT,
        CHUNKS,
        NewRequestData="req_id= prompt_token_ids= mm_features= sampling_params= pooling_params= block_ids= "
        "num_computed_tokens= lora_request= prefill_token_ids=",
        CachedRequestData="req_ids= resumed_req_ids= new_token_ids= all_token_ids= new_block_ids= num_computed_tokens= "
        "num_output_tokens=",
    ),
    *exports("vllm.v1.outputs", SCHED, "ModelRunnerOutput"),
    *calls("vllm.v1.outputs", COMPAT, KVConnectorOutput="finished_recving="),
    *reads("vllm.v1.outputs:KVConnectorOutput", CONNECTOR, "failed_recving"),
    *reads("vllm.v1.outputs:KVConnectorOutput", f"{CONNECTOR} {HOST}", "finished_recving kv_connector_worker_meta"),
    *reads("vllm.v1.engine:EngineCoreOutputs", SCHED, "scheduler_stats"),
    *calls("vllm.logger", f"{SCHED} {METRICS} lanes/connector_worker.py", init_logger="name"),
    # The connector of two lanes.
    *exports(CONNECTORS, CONNECTOR, "KVConnectorMetadata KVConnectorRole KVConnectorWorkerMetadata"),
    *exports(CONNECTORS, f"{CONNECTOR} {LAUNCH}", "KVConnectorBase_V1"),
    *exports("vllm.v1.core.kv_cache_manager", CONNECTOR, "KVCacheBlocks"),
    *calls("vllm.v1.core.kv_cache_manager:KVCacheBlocks", CONNECTOR, get_block_ids=""),
    *reads(f"{CONNECTORS}:KVConnectorRole", CONNECTOR, "WORKER"),
    *implements(f"{CONNECTORS}:KVConnectorWorkerMetadata", CONNECTOR, "aggregate"),
    *overrides(f"{CONNECTORS}:KVConnectorWorkerMetadata", CONNECTOR, aggregate="other"),
    *calls(CONNECTORS, "lanes/connector_worker.py", KVConnectorTransferResults="finished_recving= failed_recving="),
    *reads(f"{CONNECTORS}:KVConnectorTransferResults", "lanes/connector_worker.py", "finished_recving"),
    *implements(
        f"{CONNECTORS}:KVConnectorBase_V1",
        f"{CONNECTOR} {LAUNCH}",
        "get_num_new_matched_tokens update_state_after_alloc build_connector_meta start_load_kv wait_for_layer_load "
        "save_kv_layer wait_for_save",
    ),
    *overrides(
        f"{CONNECTORS}:KVConnectorBase_V1",
        CONNECTOR,
        __init__="vllm_config role kv_cache_config",
        update_connector_output="connector_output",
        get_mem_pool_context="",
        register_kv_caches="kv_caches",
        handle_preemptions="kv_connector_metadata",
        get_transfer_results="finished_req_ids",
        build_connector_worker_meta="",
        shutdown="",
    ),
    *overrides(
        f"{CONNECTORS}:KVConnectorBase_V1",
        f"{CONNECTOR} {LAUNCH}",
        get_num_new_matched_tokens="request num_computed_tokens",
        update_state_after_alloc="request blocks num_external_tokens",
        build_connector_meta="scheduler_output",
        start_load_kv="forward_context ...",
        wait_for_layer_load="layer_name",
        save_kv_layer="layer_name kv_layer attn_metadata ...",
        wait_for_save="",
    ),
    *overrides(f"{CONNECTORS}:KVConnectorBase_V1", LAUNCH, has_connector_metadata=""),
    *exports("vllm.distributed.kv_transfer", LAUNCH, "kv_transfer_state"),
    *exports(STATE, LAUNCH, "_KV_CONNECTOR_AGENT"),
    *says(f"{STATE}:has_kv_transfer_group", LAUNCH, "_KV_CONNECTOR_AGENT is not None"),
    *says(
        "vllm.model_executor.layers.attention.kv_transfer_utils:maybe_transfer_kv_layer",
        LAUNCH,
        "get_attention_context(layer_name)",
        "connector.has_connector_metadata()",
        "connector.wait_for_layer_load(layer_name)",
        "func(*args, **kwargs)",
    ),
    *exports("vllm", LAUNCH, "forward_context"),
    *exports("vllm.forward_context", LAUNCH, "_forward_context"),
    *says("vllm.forward_context:get_forward_context", LAUNCH, "return _forward_context"),
    *calls("vllm.distributed.kv_transfer", LANES, get_kv_transfer_group="", has_kv_transfer_group=""),
    # Control calls: `pause` and `sleep` change the engine's state before these are called, `sleep` pauses it first.
    *exports("vllm.v1.engine.core", CONTROL, "EngineCore"),
    *overrides(
        "vllm.v1.engine.core:EngineCore",
        CONTROL,
        reset_prefix_cache="reset_running_requests reset_connector",
        sleep="level mode",
    ),
    *reads("vllm.v1.engine.core:EngineCore", CONTROL, "model_executor"),
    *says("vllm.v1.engine.core:EngineCore._reset_caches", CONTROL, "self.reset_prefix_cache("),
    *calls("vllm.v1.executor.abstract:Executor", CONTROL, collective_rpc="method"),
    # What the plugin wraps in every process.
    *exports("vllm.engine.arg_utils", f"{HOOKS} doctor_engine.py", "EngineArgs"),
    *overrides(f"{ARGS}", HOOKS, create_engine_config="..."),
    *overrides(f"{ARGS}", HOOKS, from_cli_args="args"),
    *reads(ARGS, HOOKS, "scheduler_cls"),
    *reads(ARGS, ASKED, "additional_config"),
    *exports("vllm.v1.core.sched.interface", HOOKS, "SchedulerInterface"),
    *reads(ARGS, f"{LANES} {HOST}", "data_parallel_size enable_prefix_caching kv_offloading_size kv_transfer_config"),
    *reads(ARGS, LANES, "enable_chunked_prefill enable_lora"),
    *reads(ARGS, LANES, "pipeline_parallel_size speculative_config tensor_parallel_size"),
    *reads(ARGS, f"{LANES} {SHARED}", "weight_transfer_config"),
    *reads(ARGS, f"{LANES} {CUDA} {CPU}", "worker_cls"),
    *reads(ARGS, LANES, "decode_context_parallel_size prefill_context_parallel_size"),
    *reads(ARGS, LANES, "worker_extension_cls"),
    *calls(ARGS, f"{LANES} doctor_engine.py", create_model_config=""),
    *exports("vllm.v1.engine.input_processor", HOOKS, "InputProcessor"),
    *overrides("vllm.v1.engine.input_processor:InputProcessor", HOOKS, process_inputs="request_id prompt params ..."),
    *reads("vllm.v1.engine.input_processor:InputProcessor", HOOKS, "vllm_config"),
    *calls("vllm.exceptions", ASKED, VLLMValidationError="message parameter="),
    *exports("vllm.v1.metrics.stats", HOOKS, "SchedulerStats"),
    *exports(LOGGERS, HOOKS, "StatLoggerManager"),
    *overrides(f"{LOGGERS}:StatLoggerManager", HOOKS, __init__="vllm_config client_count= enable_default_loggers= ..."),
    *reads(f"{LOGGERS}:StatLoggerManager", HOOKS, "engine_indexes stat_loggers"),
    *exports(LOGGERS, METRICS, "AggregateStatLoggerBase"),
    *implements(f"{LOGGERS}:AggregateStatLoggerBase", METRICS, "__init__ record log_engine_initialized"),
    *overrides(
        f"{LOGGERS}:AggregateStatLoggerBase",
        METRICS,
        record="scheduler_stats iteration_stats mm_cache_stats engine_idx",
        log_engine_initialized="",
        log="",
    ),
    *calls("vllm.v1.metrics.utils", METRICS, create_metric_per_engine="metric per_engine_labelvalues"),
    # Configuration, platform, parameters of requests.
    *exports(
        "vllm.config", f"vllm_compat/__init__.py {LANES} {CUDA} {CPU} {METRICS} {SHARED}", "ModelConfig VllmConfig"
    ),
    *reads(CONFIG, f"{SCHED} {CONNECTOR} {HOOKS} {ASKED} {CPU_WORKER}", "additional_config"),
    *reads(CONFIG, f"{CONNECTOR} {SHARED} gpucheck/pressure_engine.py", "cache_config"),
    *reads(CONFIG, f"{SHARED} {CPU} {RUNNER}", "compilation_config"),
    *reads(CONFIG, f"vllm_compat/__init__.py {SCHED} {RUNNER} {CPU_WORKER}", "scheduler_config"),
    *reads(CONFIG, COMPAT, "device_config"),
    *reads(CONFIG, f"{SHARED} {METRICS}", "model_config"),
    *reads(CONFIG, f"{COMPAT} {CUDA} {SHARED}", "parallel_config"),
    *reads(CONFIG, CUDA, "use_v2_model_runner"),
    *reads(CONFIG, f"{COMPAT} {CPU} {WEIGHTS}", "kv_transfer_config"),
    *reads("vllm.config:CacheConfig", f"{SCHED} scheduler/features/lane.py", "block_size"),
    *reads("vllm.config:CacheConfig", WORKER, "kv_cache_memory_bytes"),
    *reads("vllm.config:CompilationConfig", f"{CPU} {RUNNER}", "static_forward_context"),
    *reads("vllm.config:CompilationConfig", RUNNER, "cudagraph_mode"),
    *reads("vllm.config.compilation:CUDAGraphMode", f"{RUNNER} {GRAPHS}", "NONE"),
    *reads("vllm.config.compilation:CUDAGraphMode", GRAPHS, "FULL"),
    *reads("vllm.config:DeviceConfig", COMPAT, "device_type"),
    *reads("vllm.config:ModelConfig", METRICS, "served_model_name"),
    *reads(
        "vllm.config:ModelConfig",
        LANES,
        "is_attention_free is_diffusion is_encoder_decoder is_hybrid is_multimodal_model",
    ),
    *reads("vllm.config:ModelConfig", f"{LANES} {CPU_WORKER}", "runner_type"),
    *calls("vllm.config:ModelConfig", LANES, get_sliding_window=""),
    *reads("vllm.config:ParallelConfig", SCHED, "pipeline_parallel_size"),
    *reads("vllm.config:ParallelConfig", CUDA, "worker_cls"),
    *reads("vllm.config:SchedulerConfig", "vllm_compat/__init__.py", "scheduler_cls"),
    *reads("vllm.config:SchedulerConfig", SCHED, "async_scheduling"),
    *reads("vllm.config:SchedulerConfig", COMPAT, "enable_chunked_prefill long_prefill_token_threshold policy"),
    *reads("vllm.config:SchedulerConfig", f"{RUNNER} {CPU_WORKER}", "max_num_batched_tokens max_num_seqs"),
    *calls(
        "vllm.config",
        LANES,
        KVTransferConfig="kv_connector= kv_connector_module_path= kv_role= kv_load_failure_policy=",
    ),
    *reads("vllm.config:KVTransferConfig", f"{COMPAT} {LANES} {WEIGHTS} {HOST}", "kv_connector"),
    *calls("vllm.config", RUNNER, set_current_vllm_config="vllm_config"),
    *exports("vllm.platforms", f"{LANES} {CUDA} {CPU} {HOST} lanes/connector_worker.py", "current_platform"),
    *calls("vllm.platforms.interface:Platform", f"{LANES} {CPU} {HOST} lanes/connector_worker.py", is_cpu=""),
    *calls("vllm.platforms.interface:Platform", CUDA, get_device_capability="", is_cuda=""),
    *reads("vllm.platforms.interface:DeviceCapability", CUDA, "major"),
    *exports("vllm", f"{CUDA} {CPU_WORKER}", "envs"),
    *exports("vllm.envs", CUDA, "VLLM_USE_V2_MODEL_RUNNER"),
    *exports("vllm.envs", CPU_WORKER, "VLLM_CPU_CI_ENV"),
    *calls("vllm.sampling_params", CPU, SamplingParams=""),
    # A grammar that another thread makes is a future until somebody asks for it.
    *says(
        "vllm.v1.structured_output.request:StructuredOutputRequest._check_grammar_completion",
        COMPAT,
        "isinstance(self._grammar, Future)",
        "self._grammar = self._grammar.result()",
    ),
    *reads(SAMPLING, f"{ASKED} {SCHED}", "extra_args"),
    *reads(SAMPLING, COMPAT, "seed"),
    *reads(SAMPLING, LANES, "prompt_logprobs"),
    *WORKERS,
    *SHARED_STATE,
    *HOST_MEMORY,
)
"""In no order that matters; a symbol stands here once per way it is used."""
