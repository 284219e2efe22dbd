"""The one table of DeepSpeed's keys: each is honoured, refused, or a no-op that says why it changes no value.

Nothing else exists. A key's place is its dotted path in ds_config.json. Blocks are what its prefixes say.

Source: DeepSpeed 0.19.8.
"""

from __future__ import annotations

from funczero.deepspeed.config.key import REFUSED, ROWS, SCALE, Key, count, honour, ignore, refuse

_NAMES = "fp32", "fp16", "bf16", "float32", "float16", "bfloat16", "float", "half"
_DTYPES = tuple(p + n for n in _NAMES for p in ("", "torch."))
_SHORT = ("fp32", "fp16", "bf16")
MESSAGES = "it sizes messages, not values"
LAYOUT = "it places values in memory, it does not change them"
ORDER = "it schedules the same values"
LOG = "it writes logs; the metrics are what step(...) returns"
REMOVED = "DeepSpeed has removed this feature; delete the key"
OFFLOAD = 'offload does not exist here yet; write {"device": "none"} or delete the block'
REMAT = "it saves memory in the forward; write fz.layers(..., remat=True) for that"
HERE = "a pipeline module reads it, and there is none here"

_TOP: dict[str, Key] = {
    "train_batch_size": honour(None, "int", high=ROWS),
    "train_micro_batch_size_per_gpu": honour(None, "int", high=ROWS),
    "gradient_accumulation_steps": honour(None, "int", high=ROWS),
    "managed_gradient_accumulation": honour(True),
    "gradient_clipping": honour(1.0, low=0),
    "prescale_gradients": ignore(False, "the mean is taken once, exactly; when one divides is rounding"),
    "gradient_predivide_factor": ignore(
        1.0, "the mean is taken once, exactly; when one divides is rounding", low=1e-6, high=1e6
    ),
    "gradient_allreduce_op": honour("mean", choices=("mean", "sum")),
    "communication_data_type": honour(None, "text", choices=_SHORT),
    "seq_parallel_communication_data_type": ignore("fp32", "there is no sequence parallelism here", choices=_SHORT),
    "torch_autocast.enabled": refuse(
        False, "write bf16 or fp16 instead: a policy casts the parameters, not the operations"
    ),
    "torch_autocast.dtype": ignore(None, "torch_autocast is off", "text", choices=_DTYPES),
    "torch_autocast.lower_precision_safe_modules": ignore(None, "torch_autocast is off", "list"),
    "zero_allow_untested_optimizer": ignore(
        False, "an optimizer that works value by value is always allowed, another never"
    ),
    "zero_force_ds_cpu_optimizer": ignore(True, "there is one implementation of every optimizer"),
    "dataloader_drop_last": honour(False),
    "steps_per_print": honour(None, "every", 1),  # inf: never
    "wall_clock_breakdown": honour(False),
    "memory_breakdown": ignore(False, LOG),
    "dump_state": ignore(False, LOG),
    "log_level": ignore(None, LOG, "text"),
    "disable_allgather": ignore(False, "DeepSpeed reads it without effect"),
    "disable_python_gc": ignore(False, "it concerns Python's memory"),
    "vocabulary_size": ignore(None, "DeepSpeed only warns by it", "int", 1, high=ROWS),
    "use_data_before_expert_parallelism": refuse(False, "there are no experts here; delete the key"),
    "expert_parallel": Key("off", None, REFUSED, "there are no experts here; delete the block"),
    "sequence_parallel_size": refuse(None, "there is no sequence parallelism here; delete the key", "int", (1,), 1),
    "data_parallel_size": honour(None, "int", 1, high=ROWS),
    "data_types.grad_accum_dtype": honour(None, "text", choices=_DTYPES),
    "data_types.param_dtype": honour(None, "text", choices=_DTYPES),
    "data_types.buffer_dtype": refuse(
        None, "buffers keep their dtype; cast them in the module and delete the key", "text"
    ),
    "data_types.keep_in_fp32_modules": refuse("auto", "buffers keep their dtype already; delete the key", "any"),
    "weight_quantization": Key("off", None, REFUSED, "it is for inference; delete the block"),
    "datastates": Key("off", None, REFUSED, "checkpoints are written by one engine here; delete the block"),
    "hybrid_engine": Key("off", None, REFUSED, "there is no generation engine here; delete the block"),
    "data_efficiency": Key("off", None, REFUSED, "order and choice of the data are the batches' own; delete the block"),
    "autotuning": Key("off", None, REFUSED, "nothing here tunes a config; write the values it should have"),
    "tensor_parallel": Key("off", None, REFUSED, "there is no tensor parallelism here; delete the block"),
    "funczero.sums": honour("tree", choices=("tree", "exact", "backend")),  # ours; DeepSpeed reads over the block
    "compile": ignore(None, "DeepCompile schedules the same values, and it does not exist here", "any"),
}
_REMOVED = {
    name: Key("off", None, REFUSED, REMOVED)
    for name in (
        "amp", "compression_training", "curriculum_learning", "elasticity", "eigenvalue", "graph_harvesting",
        "nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
        "zero_optimization.zeropp_loco_param", "zero_optimization.zenflow",
        "zero_optimization.mics_hierarchical_params_gather",
    )
}  # fmt: skip
_MICS = refuse(None, "write fz.mics(...) as the chain, and delete the key", "int", (-1, 0))
_REMOVED["zero_optimization.mics_shard_size"] = _MICS

_PRECISION: dict[str, Key] = {
    "fp16.enabled": honour(False),
    "fp16.loss_scale": honour(0.0, low=0, high=SCALE),
    "fp16.initial_scale_power": honour(16, low=0, high=32),
    "fp16.loss_scale_window": count(1000),
    "fp16.hysteresis": count(2),
    "fp16.consecutive_hysteresis": honour(False),
    "fp16.min_loss_scale": honour(1, low=1, high=SCALE),
    "fp16.auto_cast": honour(False),
    "fp16.fp16_master_weights_and_grads": refuse(
        False, "masters are float32; delete the key, or write policy='params=float16' in a chain of your own"
    ),
    "bf16.enabled": honour(False),
    "bf16.check_grad_overflow": refuse(
        True, "an update with a gradient that is not finite is always skipped here; delete the key"
    ),
    "bf16.immediate_grad_update": ignore(False, "gradients are summed as soon as they exist"),
    "bf16.bf16_master_weights_and_grads": refuse(
        False, "masters are float32; delete the key, or write policy='params=bfloat16' in a chain of your own"
    ),
    "bf16.bf16_optimizer_states": refuse(False, "moments are in the masters' dtype, float32; delete the key"),
}

_ZERO: dict[str, Key] = {
    "stage": honour(0, choices=(0, 1, 2, 3)),
    **{
        k: ignore(v, LAYOUT)
        for k, v in {
            "contiguous_gradients": True,
            "round_robin_gradients": False,
            "parameter_alignment": False,
            "elastic_checkpoint": False,
        }.items()
    },
    **{
        k: ignore(True, "sums are those of one fixed tree, whatever sends them")
        for k in ("reduce_scatter", "allgather_partitions", "use_multi_rank_bucket_allreduce")
    },
    **{k: ignore(500_000_000, MESSAGES, low=1) for k in ("reduce_bucket_size", "allgather_bucket_size")},
    "overlap_comm": ignore(None, ORDER, "flag"),
    "compute_grad_norm": ignore(True, "the norm comes with the mean"),
    "ignore_unused_parameters": ignore(True, "an unused parameter has a zero gradient"),
    "load_from_fp32_weights": ignore(True, "masters are loaded as they were saved"),
    "legacy_stage1": refuse(False, "delete the key"),
    "sub_group_size": ignore(1_000_000_000, "elementwise optimizers do not see tiles", low=1),
    "stage3_prefetch_bucket_size": ignore(50_000_000, ORDER, low=0),
    "stage3_max_live_parameters": ignore(1_000_000_000, ORDER, low=0),
    "stage3_max_reuse_distance": ignore(1_000_000_000, ORDER, low=0),
    "stage3_module_granularity_threshold": ignore(0, ORDER, low=0),
    "stage3_use_all_reduce_for_fetch_params": ignore(False, ORDER),
    "stage3_allgather_sequential": ignore(False, ORDER),
    "stage3_param_persistence_threshold": honour(100_000, low=0),
    "stage3_model_persistence_threshold": ignore(2**63 - 1, "the sum of small leaves is not capped", low=0),
    "stage3_gather_16bit_weights_on_model_save": honour(False),
    "offload_optimizer.device": Key("text", "none", REFUSED, OFFLOAD, choices=("none", "cpu", "nvme")),
    "offload_optimizer.nvme_path": ignore(None, LAYOUT, "text"),
    "offload_optimizer.buffer_count": ignore(4, LAYOUT, low=1),
    **{
        f"offload_optimizer.{k}": ignore(v, LAYOUT)
        for k, v in {"pin_memory": True, "pipeline_read": False, "pipeline_write": False, "fast_init": False}.items()
    },
    "offload_optimizer.ratio": ignore(1.0, LAYOUT, low=0, high=1),
    "offload_optimizer.super_offload": ignore(False, ORDER),
    "offload_optimizer.cpuadam_cores_perc": ignore(0.8, ORDER, low=0, high=1),
    "offload_param.device": Key("text", "none", REFUSED, OFFLOAD, choices=("none", "cpu", "nvme")),
    "offload_param.nvme_path": ignore(None, LAYOUT, "text"),
    "offload_param.buffer_count": ignore(5, LAYOUT, low=1),
    "offload_param.buffer_size": ignore(100_000_000, LAYOUT, low=1),
    "offload_param.max_in_cpu": ignore(1_000_000_000, LAYOUT, low=0),
    "offload_param.pin_memory": ignore(True, LAYOUT),
    "cpu_offload_use_pin_memory": ignore(False, LAYOUT),
    "zero_hpz_partition_size": honour(1, low=1),
    **{f"zero_quantized_{k}": honour(False) for k in ("weights", "gradients", "nontrainable_weights")},
    **{k: ignore(True, "nothing of torch is patched") for k in ("memory_efficient_linear", "override_module_apply")},
    "pipeline_loading_checkpoint": ignore(False, ORDER),
    "log_trace_cache_warnings": ignore(False, LOG),
    "enable_sanity_checks": ignore(False, "ranks compare what they launch anyway"),
    "save_muon_momentum_buffer_in_memory": ignore(False, LAYOUT),
    **{f"leaf_module.{k}": ignore(None, ORDER, "list") for k in ("classes", "names", "name_suffixes")},
}

_REST: dict[str, Key] = {
    "checkpoint.tag_validation": honour("warn", choices=("ignore", "warn", "fail")),
    "checkpoint.load_universal": honour(False),
    "checkpoint.use_node_local_storage": honour(False),
    "checkpoint.parallel_write.pipeline_stage": ignore(False, HERE),
    "checkpoint.checkpoint_serialization": ignore(True, LAYOUT),
    "checkpoint.writer": ignore(None, LAYOUT, "any"),
    "pipeline.stages": ignore("auto", HERE, "any"),
    "pipeline.partition": ignore("best", HERE),
    "pipeline.seed_layers": ignore(False, HERE),
    "pipeline.activation_checkpoint_interval": ignore(0, HERE, low=0),
    "pipeline.pipe_partitioned": ignore(True, HERE),
    "pipeline.grad_partitioned": ignore(True, HERE),
    **{
        f"activation_checkpointing.{k}": ignore(False, REMAT)
        for k in (
            "partition_activations",
            "cpu_checkpointing",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
        )
    },
    "activation_checkpointing.number_checkpoints": ignore(None, REMAT, "int", 1),
    **{
        f"{block}.{k}": honour(v)
        for block in ("tensorboard", "csv_monitor")
        for k, v in {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"}.items()
    },
    **{
        f"wandb.{k}": honour(v, "" if v is not None else "text")
        for k, v in {"enabled": False, "group": None, "team": None, "project": "deepspeed"}.items()
    },
    "comet.enabled": ignore(False, LOG),
    "comet.samples_log_interval": ignore(100, LOG, low=1),
    **{
        f"comet.{k}": ignore(None, LOG, "any")
        for k in ("project", "workspace", "api_key", "experiment_name", "experiment_key", "online", "mode")
    },
    "comms_logger.enabled": honour(False),
    **{
        f"comms_logger.{k}": ignore(v, "bytes are counted by axis, what and wire; no launch is timed by itself")
        for k, v in {"verbose": False, "prof_all": True, "debug": False, "prof_ops": []}.items()
    },
    "flops_profiler.enabled": honour(False),
    "flops_profiler.profile_step": honour(1, low=0),
    "flops_profiler.module_depth": honour(-1, low=-1),
    "flops_profiler.top_modules": honour(1, low=1),
    "flops_profiler.detailed": honour(True),
    "flops_profiler.output_file": honour(None, "text"),
    "flops_profiler.recompute_fwd_factor": ignore(0.0, "what runs again in the backward is counted there", low=0),
    **{f"timers.throughput.{k}": ignore(True, LOG) for k in ("enabled", "synchronized")},
    **{
        f"aio.{k}": ignore(v, LAYOUT, low=1)
        for k, v in {
            "block_size": 1048576,
            "queue_depth": 8,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
            "use_gds": False,
        }.items()
    },
    "optimizer.type": honour(None, "text"),
    "optimizer.legacy_fusion": ignore(False, "there is one implementation of every optimizer"),
    "scheduler.type": honour(None, "text"),
}

OFFLOADS = "zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"
# at the top level; DeepSpeed reads none of them, and configs in use have them
PASSED_OVER = "checkpointing", "cuda_visible_devices", "backend", "monitor_config", "comms_config"
KEYS: dict[str, Key] = {
    **_TOP,
    **_REMOVED,
    **_PRECISION,
    **{f"zero_optimization.{k}": v for k, v in _ZERO.items()},
    **_REST,
}
LITERAL_AUTO = ("data_types.keep_in_fp32_modules", "pipeline.stages")  # "auto" is a value of these, not a place to fill
ENGINE = (  # honoured by an engine; a chain has no loader, prints, monitor, checkpoints and no boundary but its own
    "managed_gradient_accumulation", "dataloader_drop_last", "steps_per_print",
    "tensorboard.enabled", "csv_monitor.enabled", "wandb.enabled", "wall_clock_breakdown", "comms_logger.enabled",
    "flops_profiler.enabled", "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "checkpoint.tag_validation", "checkpoint.load_universal", "checkpoint.use_node_local_storage",
)  # fmt: skip

_Z = "zero_optimization."
ALIASES: dict[str, str] = {
    "bfloat16": "bf16",
    "allgather_size": _Z + "allgather_bucket_size",
    _Z + "gather_16bit_weights_on_model_save": _Z + "stage3_gather_16bit_weights_on_model_save",
    _Z + "stage3_gather_fp16_weights_on_model_save": _Z + "stage3_gather_16bit_weights_on_model_save",
    **{
        _Z + k: f"{_Z}stage3_{k}"
        for k in (
            "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance", "module_granularity_threshold",
            "use_all_reduce_for_fetch_params", "allgather_sequential", "param_persistence_threshold",
            "model_persistence_threshold",
        )
    },
}  # fmt: skip
