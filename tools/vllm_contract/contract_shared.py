"""The part of the contract behind what two lanes on a GPU are refused for: what both would write, and weights that change."""

from vllm_contract.symbols import exports, overrides, reads, says

SHARED, WEIGHTS = "vllm_compat/shared_state.py", "vllm_compat/weights.py"
ARGS = "vllm.engine.arg_utils:EngineArgs"
CONFIG = "vllm.config:VllmConfig"
EXPERTS = "vllm.model_executor.layers.fused_moe"
OFFLOAD = "vllm.config.offload"
PREFETCH = "vllm.model_executor.offloader.prefetch"
WORKER = "vllm.v1.worker.gpu_worker:Worker"

SHARED_STATE = (
    # Settings, in both places where vLLM has them.
    *reads(ARGS, SHARED, "aux_output_config compilation_config enable_dbo enable_eplb enable_return_routed_experts"),
    *reads(ARGS, SHARED, "kernel_config kv_sharing_fast_prefill linear_backend moe_backend offload_backend"),
    *reads(ARGS, SHARED, "attention_backend attention_config kv_cache_dtype"),
    *reads(ARGS, "doctor_engine.py", "enable_sleep_mode model quantization"),
    *reads(ARGS, SHARED, "offload_group_size ubatch_size"),
    *reads(CONFIG, SHARED, "attention_config aux_output_config kernel_config offload_config weight_transfer_config"),
    *reads("vllm.config:CacheConfig", SHARED, "cache_dtype kv_sharing_fast_prefill"),
    *reads("vllm.config:AttentionConfig", SHARED, "backend"),
    # Which attention backend vLLM chooses by itself, and where FLASH_ATTN takes an FP8 cache.
    *says(
        "vllm.platforms.cuda:_get_backend_priorities",
        SHARED,
        "device_capability.major == 10 and\nAttentionBackendEnum.FLASHINFER,\nAttentionBackendEnum.FLASH_ATTN,\n"
        "AttentionBackendEnum.FLASH_ATTN,\nAttentionBackendEnum.FLASHINFER,\nAttentionBackendEnum.TRITON_ATTN,",
    ),
    *says(
        "vllm.v1.attention.backends.fa_utils:flash_attn_supports_kv_cache_dtype",
        SHARED,
        "kv_cache_dtype == 'fp8_e5m2'",
        "is_device_capability_family(90)",
    ),
    *reads("vllm.config:CompilationConfig", SHARED, "cudagraph_copy_inputs mode"),
    *reads("vllm.config.compilation:CompilationMode", SHARED, "STOCK_TORCH_COMPILE"),
    *reads("vllm.config:ModelConfig", SHARED, "enable_sleep_mode hf_text_config is_moe quantization"),
    *reads("vllm.config:ParallelConfig", SHARED, "enable_dbo enable_eplb ubatch_size"),
    *reads("vllm.config.kernel:KernelConfig", SHARED, "linear_backend moe_backend"),
    *reads("vllm.config.aux_output:AuxOutputConfig", SHARED, "enable_return_routed_experts"),
    *reads(f"{OFFLOAD}:OffloadConfig", SHARED, "offload_backend prefetch"),
    *reads(f"{OFFLOAD}:PrefetchOffloadConfig", SHARED, "offload_group_size"),
    # Why: prefetched weights have static buffers, weights read over UVA have none.
    *says(
        "vllm.model_executor.offloader.base:create_offloader",
        SHARED,
        "prefetch.offload_group_size > 0\nbackend = 'prefetch'\nuva.cpu_offload_gb > 0\nbackend = 'uva'",
        "PrefetchOffloader(\nUVAOffloader(",
    ),
    *says(f"{PREFETCH}:PrefetchOffloader.post_init", SHARED, "StaticBufferPool("),
    *says(
        "vllm.model_executor.offloader.uva:UVAOffloader._maybe_offload_to_cpu",
        SHARED,
        "p.data = get_accelerator_view_from_cpu_tensor(cpu_data)\nv.to(device, non_blocking=True)\nfunctional_call(",
    ),
    *says("vllm.compilation.backends:make_copy_and_call", SHARED, "static_tensor.copy_(runtime_tensor)"),
    *exports("vllm.utils.torch_utils", SHARED, "_aux_stream"),
    *says("vllm.utils.torch_utils:aux_stream", SHARED, "_aux_stream = torch.cuda.Stream()"),
    *says(
        "vllm.model_executor.layers.fused_moe.runner.shared_experts:SharedExperts.__init__",
        SHARED,
        "envs.VLLM_DISABLE_SHARED_EXPERTS_STREAM\nself._stream = None\nself._stream = aux_stream()",
    ),
    *says("vllm.config:ParallelConfig.use_ubatching", SHARED, "self.enable_dbo or self.ubatch_size > 1"),
    *says(
        "vllm.model_executor.layers.fused_moe.oracle.unquantized:_get_priority_backends",
        SHARED,
        "is_device_capability_family(90)\n_move_to_back(_AVAILABLE_BACKENDS, UnquantizedMoeBackend.FLASHINFER_TRTLLM)",
    ),
    *reads(f"{EXPERTS}.oracle.unquantized:UnquantizedMoeBackend", SHARED, "TRITON"),
    *reads(f"{EXPERTS}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod", SHARED, "unquantized_backend"),
    *says(
        f"{EXPERTS}.routed_experts:RoutedExperts.__init__",
        SHARED,
        "self.quant_method",
    ),
    *says(
        "vllm.model_executor.layers.utils:dispatch_unquantized_gemm",
        SHARED,
        "_FLASHINFER_BF16_BACKENDS.get(linear_backend)\nreturn default_unquantized_gemm",
    ),
    *says(
        "vllm.distributed.aux_output_connector.worker:AuxOutputWorkerConnector.__init__",
        SHARED,
        "bind_routed_experts_capturer(model, capturer)",
    ),
    *says(
        "vllm.config:VllmConfig._post_init_kv_transfer_config",
        "vllm_compat/lanes.py",
        "self.kv_transfer_config.kv_connector = ",
    ),
    # Plugins are loaded in every process before CUDA starts there, and when `EngineArgs` are made.
    *exports("vllm.envs", "vllm_compat/cuda.py", "VLLM_ENABLE_V1_MULTIPROCESSING"),
    *says(f"{ARGS}.__post_init__", "vllm_compat/cuda.py plugin.py", "load_general_plugins()"),
    *says(
        "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker",
        "vllm_compat/cuda.py plugin.py",
        "load_general_plugins()",
    ),
    *says(f"{WORKER}.init_device", "vllm_compat/cuda.py", "set_device_index(self.device)"),
    # Weights that change: a worker has its configuration, and these methods take what vLLM passes on.
    *reads(WORKER, f"{WEIGHTS} vllm_compat/cuda_worker.py", "vllm_config"),
    *overrides(
        WORKER,
        WEIGHTS,
        reload_weights="...",
        reset_weights="...",
        init_weight_transfer_engine="...",
        start_weight_update="...",
        start_draft_weight_update="...",
        update_weights="...",
        finish_weight_update="...",
        sleep="...",
    ),
)
