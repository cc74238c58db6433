"""LLM Foundry keys that need no code: dropped, accepted at one value, empty, or rejected with an alternative.

Paths are dotted, and the first list that contains one applies.
"""

from __future__ import annotations

# Hub datasets whose rows LLM Foundry converts by itself: the keys of data/foundry_tasks.TASKS, which imports torch.
TASKS = (
    "tatsu-lab/alpaca", "HuggingFaceH4/databricks_dolly_15k", "bigscience/P3", "Muennighoff/P3", "Muennighoff/flan",
    "teknium/OpenHermes-2.5", "math-ai/StackMathQA", "AI-MO/NuminaMath-CoT",
)  # fmt: skip

# Keys that tune an implementation and do not affect results. They are dropped, with a note.
GONE = {
    "python_log_level": "logs are at level INFO",
    "max_split_size_mb": "set PYTORCH_ALLOC_CONF instead",
    "expandable_segments": "set PYTORCH_ALLOC_CONF instead",
    "flatten_metadata": "loggers have the whole config",
    "callbacks.scheduled_gc": "collections are not forced",
    "model.init_device": "models are always built on meta",
    "model.fc_type": "linear layers are torch's",
    "model.fuse_norm_attn_norm": "the same layers, whose names checkpoints are read with",
    "model.param_init_fn": "set by init_config",
    "model.init_nonlinearity": "set by init_config",
    "model.verbose": "",
    "model.init_config.verbose": "",
    "model.attn_config.verbose": "",
    "model.ffn_config.fc_type": "linear layers are torch's",
    "model.ffn_config.moe_lbl_in_fp32": "the balance loss is always float32",
    "model.ffn_config.moe_zloss_in_fp32": "the z-loss is always float32",
    "model.ffn_config.memory_optimized_mlp": "only the layer's input and hidden activations are kept",
    "model.ffn_config.return_bias": "",
    "model.use_train_metrics": "the training loss is always logged",
    "model.additional_train_metrics": "the training loss is always logged",
    "model.additional_eval_metrics": "the loss of an evaluation is always logged",
    "model.activation_checkpointing_target": "parallel.recompute names what is computed again",
    "model.attn_config.fused_qkv": "one matrix in any case",
    "model.ffn_config.remat_act_fn": "",
    "model.ffn_config.fp16": "set by precision",
    "model.ffn_config.bf16": "set by precision",
    "model.ffn_config.device": "",
    "model.ffn_config.device_mesh": "set by parallel",
    "model.ffn_config.fc_cls": "linear layers are torch's",
    "model.ffn_config.init_method": "set by init_config",
    "model.ffn_config.output_layer_init_method": "set by init_config",
    "model.ffn_config.quantize_inputs_num_bits": "",
    "model.ffn_config.quantize_rematerialize_num_bits": "",
    "model.ffn_config.quantize_scatter_num_bits": "",
    "callbacks.oom_observer": "an out-of-memory error says what was allocated",
    "callbacks.env_logging": "the run's report names the environment",
    "callbacks.eval_output_logging": "callbacks.sample_text writes text",
    "tokenizer.kwargs.trust_remote_code": "code of a hub repository is never run",
    "save_overwrite": "a run never writes over another's checkpoints",
    "log_config": "config.yaml is always written",
    "cuda_load_lazy": "",
    "device_train_grad_accum": "set by device_train_microbatch_size",
    "device_train_batch_size": "set by global_train_batch_size and the number of ranks",
    "n_gpus": "set by the launcher",
    **{
        f"{loader}.{key}": ""
        for loader in ("train_loader", "eval_loader")
        for key in ("pin_memory", "prefetch_factor", "persistent_workers", "timeout", "sampler")
    },
    **{
        f"{loader}.dataset.{key}": why
        for loader in ("train_loader", "eval_loader")
        for key, why in (
            ("max_leftover_bins_to_keep", "every example is packed"),
            ("hf_kwargs.trust_remote_code", "code of a dataset is never run"),
            ("hf_kwargs.use_auth_token", "datasets reads $HF_TOKEN"),
        )
    },
}
# Keys that affect results, with the only values that match llmfoundry's behavior.
ONLY: dict[str, tuple[object, ...]] = {
    "model.attn_config.prefix_lm": (False,),
    "model.loss_fn": ("fused_crossentropy", "torch_crossentropy"),
    "model.use_cache": (True, False),
    "model.master_weights_dtype": (None,),
    "model.use_pad_tok_in_ffn": (True,),
    "model.ffn_config.moe_weight_parallelism": (False,),
    "model.ffn_config.moe_expert_model_parallelism": (True, False),
    "model.ffn_config.fc_kwargs": ({}, None),
    "model.attn_config.nope": (False,),
    "model.attn_config.reuse_kv_layer_idx": (None,),
    "model.attn_config.reuse_kv_x_layer_idx": (None,),
    "model.attn_config.seq_parallel_world_size": (1, None),
    "model.ffn_config.expert_parallel_group": (None,),
    "model.ffn_config.pipeline_model_parallel_size": (1,),
    "model.ffn_config.num_layers_per_virtual_pipeline_stage": (None,),
    "model.ffn_config.shared_expert_weighted_sum": (False,),
    "scheduler.scale_warmup": (False,),
    **{f"{loader}.dataset.preprocessing_kwargs": ({}, None) for loader in ("train_loader", "eval_loader")},
    **{
        f"{loader}.dataset.{key}": (1, None)
        for loader in ("train_loader", "eval_loader")
        for key in ("auto_packing_replication", "seq_parallel_replication")
    },
    "save_filename": ("ep{epoch}-ba{batch}-rank{rank}.pt", None),
    "save_latest_filename": ("latest-rank{rank}.pt", "latest-sharded-rank{rank}", None),
    "save_weights_only": (False,),
    "save_ignore_keys": (None, []),
    "load_strict_model_weights": (True,),
    "load_ignore_keys": (None, []),
    "only_hf_checkpoint": (False,),
    "only_composer_checkpoint": (False,),
    "accumulate_train_batch_on_tokens": (True,),
    "spin_dataloaders": (True,),
    "train_subset_num_batches": (-1,),
    "profiler": (None, {}),
    "tp_config": (None, {}),
    "optimizer.amsgrad": (False,),
    "loggers.mlflow.model_registry_prefix": ("", None),
    "loggers.mlflow.model_registry_uri": (None,),
}
# What to write instead of other values of these.
INSTEAD = {
    "accumulate_train_batch_on_tokens": "the loss is always over the labels of the global batch; leave it out",
    "load_ignore_keys": "write load_weights_only: true to leave out optimizer and progress, and load_allow for what "
    "may differ",
    "load_strict_model_weights": "all weights are read; make a checkpoint that holds them by `llmfoundry convert`",
    "loggers.mlflow.model_registry_prefix": "models are not registered with MLflow here; leave it out",
    "loggers.mlflow.model_registry_uri": "models are not registered with MLflow here; leave it out",
    "model.master_weights_dtype": "write optimizer.master_weights: bf16_sr, which keeps weights in bfloat16",
    "only_composer_checkpoint": "leave it out, and callbacks.hf_checkpointer too",
    "only_hf_checkpoint": "leave it out; write save_interval: 0ba, which saves only at the end",
    "optimizer.amsgrad": "leave it out",
    "profiler": "write callbacks.profiler",
    "save_filename": "a checkpoint is a folder, checkpoints/step-N; leave it out",
    "save_latest_filename": "a checkpoint is a folder, checkpoints/step-N; leave it out",
    "save_weights_only": "leave it out; `llmfoundry convert to-hf` writes only the weights",
    "tp_config": "layers are not split over ranks; parallel: {shard: ..., expert: ...} spreads the weights",
    "train_subset_num_batches": "write max_duration",
}
# Keys that may be empty, which is the same as leaving them out.
EMPTY = (
    "algorithms", "callbacks", "code_paths", "icl_seq_len", "icl_tasks", "loggers", "metadata", "model.attn_config",
    "model.attn_config.rope_hf_config", "model.attn_config.rope_dail_config", "model.ffn_config",
    "model.ffn_config.ffn_act_fn", "model.init_config",
    "tokenizer.kwargs", "train_loader.dataset.split", "train_loader.dataset.hf_kwargs", "eval_loader.dataset.split",
    "eval_loader.dataset.hf_kwargs",
)  # fmt: skip
# Keys that are not supported, and what to write instead.
REFUSED = {
    "algorithms.alibi": "write model.attn_config.alibi: true",
    "algorithms.gated_linear_units": "write model.ffn_config.ffn_type: mptglu",
    "algorithms.low_precision_layernorm": "write model.norm_type: low_precision_layernorm",
    "algorithms.layer_freezing": "write optimizer.disable_grad with the names to freeze",
    "callbacks.activation_monitor": "is not supported; callbacks.optimizer_monitor measures gradients and updates",
    "callbacks.async_eval": "is not supported; evaluate checkpoints with `llmfoundry eval` while the run continues",
    "callbacks.checkpoint_saver": "write save_folder and save_interval",
    "callbacks.curriculum_learning": "write train_loader.mixture: weights of the datasets, by the time of the run",
    "callbacks.dataset_swap": "is not supported; start a second run with load_path and load_allow: [data]",
    "callbacks.export_for_inference": "write callbacks.hf_checkpointer",
    **dict.fromkeys(
        ("callbacks.fdiff", "callbacks.fdiff_metrics"), "is not supported; loss/train/total is logged at every step"
    ),
    "callbacks.global_lr_scaling": "write optimizer.lr with the scaled rate",
    "callbacks.layer_freezing": "write optimizer.disable_grad with the names to freeze",
    "callbacks.load_checkpoint": "write load_path",
    "callbacks.loss_perp_v_len": "is not supported; leave it out",
    "callbacks.mono_checkpoint_saver": "checkpoints are whole already: `llmfoundry convert to-hf` makes one model",
    "callbacks.threshold_stopper": "write callbacks.early_stopper",
    "loggers.cometml": "write loggers.wandb, mlflow or tensorboard",
    "loggers.console": "write log_to_console and console_log_interval",
    "loggers.file_logger": "leave it out: metrics.jsonl in the save_folder has every number",
    "loggers.mosaicml": "leave it out: that platform is not reached from here",
    "loggers.neptune": "write loggers.wandb, mlflow or tensorboard",
    "loggers.remote_uploader_downloader": "leave it out: save_folder: s3://... uploads a run",
}
# Values that have another name here.
RENAMED_VALUES = {
    "model.attn_config.attn_impl": {"flash": "auto", "torch": "sdpa", "triton": "auto"},
    "model.norm_type": {"triton_rmsnorm": "rmsnorm"},
}
_BF16 = "write amp_bf16, or fp32"
# LLM Foundry values that are not supported, and what to write instead; for lists of loaders, in each.
REFUSED_VALUES = {
    "model.ffn_config.ffn_type": {"te_ln_mlp": "write mptmlp", "mptgeglu": "write mptglu"},
    "model.norm_type": {"te_layernorm": "write layernorm"},
    "optimizer.name": {
        "adalr_lion": "write decoupled_lionw, and callbacks.kill_loss_spike or max_skipped_steps against outliers",
        "clip_lion": "write decoupled_lionw, and algorithms.gradient_clipping against outliers",
        "no_op": "write decoupled_adamw, and eval_first: true to evaluate before training",
        **dict.fromkeys(("adam", "decoupled_adam"), "write adamw or decoupled_adamw"),
        **dict.fromkeys(("sgd", "decoupled_sgdw"), "write decoupled_adamw, decoupled_lionw or muon"),
    },
    "precision": dict.fromkeys(("amp_fp16", "fp16", "bf16", "pure_bf16", "tf32", "amp"), _BF16),
    "tokenizer.name": {"tiktoken": "write the name of a Hugging Face tokenizer that has the same vocabulary"},
    "train_loader.name": {
        "contrastive_pairs": "embedding models are not trained here; write text or finetuning",
        "text_denoising": "encoder-decoder models are not trained here; write text or finetuning",
    },
}  # fmt: skip
# Top-level keys that only serve `${...}`, whose references are already resolved.
VARIABLES = ("dataset", "global_seed", "icl_max_seq_len")
DURATIONS = (
    "max_duration", "eval_interval", "save_interval", "console_log_interval",
    *(f"scheduler.{key}" for key in ("t_warmup", "t_max", "t_scale", "t_cooldown")),
)  # fmt: skip
