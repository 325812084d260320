"""The keys that a DeepSpeed config may have, by section: those of 0.19, and of releases since 0.16."""

from __future__ import annotations

ALIASES = {
    name: f"stage3_{name}"
    for name in (
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "gather_16bit_weights_on_model_save",
        "module_granularity_threshold",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
    )
}
"""Fields of ``zero_optimization`` that DeepSpeed takes under two names: the field's, and its alias."""

_TOP = """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    compression_training csv_monitor curriculum_learning data_efficiency data_parallel_size data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor graph_harvesting
    hybrid_engine inference keep_in_fp32_modules log_level managed_gradient_accumulation memory_breakdown nebula optimizer
    pipeline prescale_gradients progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type
    sequence_parallel_size sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
"""
_ZERO = """
    allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
    cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module legacy_stage1
    load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear mics_hierarchical_params_gather mics_shard_size
    offload_optimizer offload_param overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint
    reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage
    stage3_gather_fp16_weights_on_model_save sub_group_size use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    zeropp_loco_param
"""
_FP16 = """
    auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads fp16_opt_level hysteresis initial_scale_power
    loss_scale loss_scale_window min_loss_scale
"""
_BF16 = """
    bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow check_overflow enabled immediate_grad_update
"""
_ADAM = """
    adam_w_mode amsgrad betas bias_correction capturable decoupled_weight_decay differentiable eps foreach
    fp32_optimizer_states fused lr max_grad_norm maximize set_grad_none torch_adam weight_decay
"""
_WARMUP = """
    cos_min_ratio last_batch_iteration lr_range_test_min_lr total_num_steps warmup_max_lr warmup_min_lr warmup_min_ratio
    warmup_num_steps warmup_type
"""

Path = tuple[str, ...]
ZERO = "zero_optimization"

SECTIONS: dict[Path, frozenset[str]] = {
    (): frozenset(_TOP.split()),
    (ZERO,): frozenset(_ZERO.split()) | frozenset(ALIASES) | frozenset(ALIASES.values()),
    (ZERO, "offload_param"): frozenset(
        ["buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"]
    ),
    (ZERO, "offload_optimizer"): frozenset(
        [
            "buffer_count",
            "cpuadam_cores_perc",
            "device",
            "fast_init",
            "nvme_path",
            "pin_memory",
            "pipeline",
            "pipeline_read",
            "pipeline_write",
            "ratio",
            "super_offload",
        ]
    ),
    (ZERO, "leaf_module"): frozenset(["classes", "names", "name_suffixes"]),
    ("fp16",): frozenset(_FP16.split()),
    ("bf16",): frozenset(_BF16.split()),
    ("bfloat16",): frozenset(_BF16.split()),
    ("optimizer",): frozenset(["legacy_fusion", "params", "type"]),
    ("optimizer", "params"): frozenset(_ADAM.split()),
    ("scheduler",): frozenset(["params", "type"]),
    ("scheduler", "params"): frozenset(_WARMUP.split()),
    ("torch_autocast",): frozenset(["dtype", "enabled", "lower_precision_safe_modules"]),
    ("data_types",): frozenset(["buffer_dtype", "grad_accum_dtype", "param_dtype"]),
    ("checkpoint",): frozenset(
        [
            "checkpoint_serialization",
            "load_universal",
            "parallel_write",
            "tag_validation",
            "use_node_local_storage",
            "writer",
        ]
    ),
    ("activation_checkpointing",): frozenset(
        [
            "contiguous_memory_optimization",
            "cpu_checkpointing",
            "number_checkpoints",
            "partition_activations",
            "profile",
            "synchronize_checkpoint_boundary",
        ]
    ),
    ("flops_profiler",): frozenset(
        [
            "detailed",
            "enabled",
            "module_depth",
            "output_file",
            "profile_step",
            "recompute_fwd_factor",
            "top_modules",
        ]
    ),
    ("aio",): frozenset(
        [
            "block_size",
            "intra_op_parallelism",
            "overlap_events",
            "queue_depth",
            "single_submit",
            "thread_count",
            "use_gds",
        ]
    ),
    ("comms_logger",): frozenset(["debug", "enabled", "prof_all", "prof_ops", "verbose"]),
    ("tensorboard",): frozenset(["enabled", "job_name", "output_path"]),
    ("csv_monitor",): frozenset(["enabled", "job_name", "output_path"]),
    ("wandb",): frozenset(["enabled", "group", "project", "team"]),
}
"""Known keys by the path of their section; sections that are not here are not looked into."""

VALIDATED = {
    (ZERO,),
    (ZERO, "offload_param"),
    (ZERO, "offload_optimizer"),
    (ZERO, "leaf_module"),
    (ZERO, "zenflow"),
}
VALIDATED |= {("fp16",), ("bf16",), ("bfloat16",)}
"""Sections in which DeepSpeed itself refuses a key that it doesn't know; elsewhere it says nothing."""
