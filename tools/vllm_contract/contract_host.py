"""The part of the contract behind host memory for KV blocks: vLLM's OffloadingConnector, and our worker of it on CPUs."""

from vllm_contract.symbols import calls, exports, implements, overrides, reads, says

HOST, CPU, SCHED = "vllm_compat/host.py", "vllm_compat/cpu_offload.py", "scheduler/scheduler.py"
CACHE, CACHE_POLICY = "vllm_compat/program_cache.py", "vllm.v1.kv_offload.cpu.policies.base:CachePolicy"
COMPAT = "vllm_compat/scheduler.py"
ARGS = "vllm.engine.arg_utils:EngineArgs"
BASE = "vllm.v1.kv_offload.base"
SPEC = "vllm.v1.kv_offload.cpu.spec:CPUOffloadingSpec"
OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading"
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:OffloadingConnector"
MANAGER = "vllm.v1.kv_offload.cpu.manager:CPUOffloadingManager"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

HOST_MEMORY = (
    # The connector, by its name, and what we tell it.
    *exports("vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector", HOST, "OffloadingConnector"),
    *reads(ARGS, HOST, "data_parallel_external_lb data_parallel_rank data_parallel_size_local"),
    *reads(ARGS, HOST, "_api_process_count _api_process_rank"),
    *calls(
        "vllm.config",
        HOST,
        KVTransferConfig="kv_connector= kv_role= kv_load_failure_policy= kv_connector_extra_config=",
    ),
    *reads("vllm.config:KVTransferConfig", f"{HOST} {COMPAT}", "kv_connector_extra_config"),
    *calls("vllm.platforms.interface:Platform", HOST, is_cuda_alike="", is_xpu=""),
    *reads("vllm.platforms.interface:Platform", HOST, "device_name"),
    *says(f"{SPEC}.__init__", HOST, "'cpu_bytes_to_use'", "'eviction_policy'"),
    *says(f"{BASE}:OffloadingSpec.__init__", HOST, "'offload_prompt_only'"),
    *says(
        "vllm.v1.kv_offload.factory:OffloadingSpecFactory.get_spec_cls",
        HOST,
        "'spec_name'",
        "'spec_module_path'",
        "getattr(spec_module, spec_name)",
    ),
    *says("vllm.v1.kv_offload.cpu.shared_offload_region:SharedOffloadRegion.__init__", HOST, "/dev/shm/"),
    # What makes room, by programs.
    *says(f"{SPEC}.__init__", HOST, "'cache_policy_module_path'"),
    *says(
        "vllm.v1.kv_offload.cpu.policies.factory:CachePolicyFactory.get_cache_policy_cls", HOST, "getattr(module, name)"
    ),
    *reads(MANAGER, HOST, "_policy"),
    *exports("vllm.v1.kv_offload.cpu.policies.base", CACHE, "CachePolicy ChunkStatus"),
    *exports(BASE, CACHE, "OffloadKey ReqContext"),
    *implements(CACHE_POLICY, CACHE, "get insert remove touch evict clear"),
    *overrides(
        CACHE_POLICY, CACHE, __init__="cache_capacity", get="key", remove="key", touch="keys req_context", clear=""
    ),
    *overrides(CACHE_POLICY, CACHE, evict="n protected", on_store_miss="keys req_context"),
    *overrides(CACHE_POLICY, CACHE, on_request_finished="key_groups insertion_only_keys reused_keys req_context"),
    *reads(f"{BASE}:ReqContext", CACHE, "req_id"),
    *calls(f"{BASE}:ReqContext", CACHE, get_offload_key_position="key"),
    *reads("vllm.v1.kv_offload.cpu.policies.base:ChunkStatus", CACHE, "ref_cnt"),
    # A chunk that is stored was missed before, and a call that has ended says what it used.
    *says(
        f"{MANAGER}.prepare_store",
        CACHE,
        "self._policy.on_store_miss(",
        "self._policy.evict(",
        "self._policy.insert(key, chunk",
    ),
    *says(f"{MANAGER}.on_request_finished", CACHE, "self._policy.on_request_finished("),
    # Our worker in the place of vLLM's.
    *exports("vllm.v1.kv_offload.cpu.spec", CPU, "CPUOffloadingSpec"),
    *overrides(SPEC, CPU, __init__="config", get_worker="kv_caches"),
    *reads(SPEC, CPU, "kv_bytes_per_chunk num_chunks"),
    *reads(f"{BASE}:OffloadingSpec", CPU, "blocks_per_chunk extra_config"),
    *exports("vllm.v1.kv_offload.config", CPU, "OffloadingConfig"),
    *reads("vllm.v1.kv_offload.config:OffloadingConfig", CPU, "canonical_layout"),
    *exports(BASE, CPU, "BlockIDsLoadStoreSpec CanonicalKVCaches CanonicalKVCacheTensor GPULoadStoreSpec"),
    *exports(BASE, CPU, "LoadStoreSpec OffloadingWorker"),
    *calls(BASE, CPU, TransferResult="job_id success transfer_size transfer_time"),
    *implements(f"{BASE}:OffloadingWorker", CPU, "submit_store submit_load get_finished wait"),
    *overrides(
        f"{BASE}:OffloadingWorker", CPU, submit_store="job_id src_spec dst_spec", get_finished="", wait="job_ids"
    ),
    *overrides(f"{BASE}:OffloadingWorker", CPU, shutdown=""),
    # vLLM 0.33 adds `expedited`, which has a default in ours.
    *calls(f"{BASE}:OffloadingWorker", CPU, submit_load="job_id src_spec dst_spec"),
    *reads(f"{BASE}:BlockIDsLoadStoreSpec", CPU, "block_ids"),
    *reads(f"{BASE}:GPULoadStoreSpec", CPU, "block_indices group_sizes"),
    *reads(f"{BASE}:CanonicalKVCaches", CPU, "group_data_refs tensors"),
    *reads(f"{BASE}:CanonicalKVCacheTensor", CPU, "page_size_bytes tensor"),
    *reads(f"{BASE}:CanonicalKVCacheRef", CPU, "tensor_idx"),
    # Blocks are not used again before they are copied: the worker waits before the model runs.
    *says(f"{OFFLOADING}.worker:OffloadingConnectorWorker.handle_preemptions", CPU, "self.worker.wait("),
    *says("vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model", CPU, ".handle_preemptions("),
    # What the scheduler looks at.
    *reads(CONNECTOR, HOST, "connector_scheduler"),
    *reads(f"{OFFLOADING}.scheduler:OffloadingConnectorScheduler", HOST, "manager"),
    *exports("vllm.v1.kv_offload.cpu.manager", HOST, "CPUOffloadingManager"),
    *reads(MANAGER, HOST, "_num_chunks"),
    *calls(MANAGER, HOST, _get_num_free_chunks="", lookup="key req_context"),
    *calls(f"{OFFLOADING}.config", HOST, build_offloading_config="vllm_config kv_cache_config"),
    *reads("vllm.v1.kv_offload.config:OffloadingConfig", HOST, "cache groups parallel replicated_layout"),
    *reads("vllm.v1.kv_offload.config:OffloadingConfig", HOST, "worker_kv_bytes_per_block"),
    *reads("vllm.v1.kv_offload.config:OffloadingCacheConfig", HOST, "blocks_per_chunk tokens_per_hash"),
    *reads("vllm.v1.kv_offload.config:OffloadingGroupConfig", HOST, "group_id tokens_per_block"),
    *reads("vllm.v1.kv_offload.config:OffloadingParallelConfig", HOST, "world_size"),
    *exports(BASE, HOST, "LookupResult"),
    *reads(f"{BASE}:LookupResult", HOST, "MISS"),
    *calls(BASE, HOST, ReqContext="req_id=", make_offload_key="block_hash group_idx"),
    *exports("vllm.v1.kv_cache_interface", HOST, "FullAttentionSpec"),
    *reads(SCHEDULER, HOST, "recompute_kv_load_failures"),
    *reads("vllm.v1.request:RequestStatus", COMPAT, "WAITING_FOR_REMOTE_KVS"),
    # What it follows: vLLM asks the attributes of the instance.
    *overrides(
        CONNECTOR,
        HOST,
        get_num_new_matched_tokens="request num_computed_tokens",
        update_connector_output="connector_output",
    ),
    *says(
        f"{SCHEDULER}.schedule",
        HOST,
        "self.connector.get_num_new_matched_tokens(",
        "if ext_tokens is None:",
        "self.kv_cache_manager.allocate_slots(",
    ),
    *says(f"{SCHEDULER}._update_from_kv_xfer_finished", HOST, "self.connector.update_connector_output("),
    *reads(f"{OFFLOADING}.common:OffloadingWorkerMetadata", HOST, "transfer_stats"),
    *reads(f"{OFFLOADING}.common:TransferStats", HOST, "load store"),
    *reads(f"{OFFLOADING}.common:DirectionalTransferStats", HOST, "bytes time"),
    # A reset forgets the copies, too, and it is the connector that does.
    *says(f"{SCHEDULER}.reset_prefix_cache", SCHED, "if reset_connector:", "self.reset_connector_cache()"),
    *reads(f"{OFFLOADING}.scheduler:OffloadingConnectorScheduler", HOST, "_current_batch_jobs_to_flush"),
    *says(
        f"{OFFLOADING}.scheduler:OffloadingConnectorScheduler.reset_cache",
        HOST,
        "assert not self._current_batch_jobs_to_flush",
    ),
)
