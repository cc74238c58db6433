"""LLM Foundry's legacy words, translated out loud.

What kept its meaning needs no translation. Here stands what was renamed, moved, or has nothing left to say; every
change is a line of notes, and whatever would alter the result without an equivalent is an error.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from llmfoundry.config import ConfigError
from llmfoundry.integrations import foundry_model
from llmfoundry.integrations.hf_causal_lm import hugging_face_model

Tree = dict[str, object]

# Keys that tuned an implementation and change no value. They go, with a note.
_GONE = {
    "python_log_level": "logs are at level INFO",
    "max_split_size_mb": "set PYTORCH_ALLOC_CONF instead",
    "expandable_segments": "set PYTORCH_ALLOC_CONF instead",
    "callbacks.scheduled_gc": "collections are not forced",
    "model.init_device": "models are always built on meta",
    "model.fc_type": "linear layers are torch's",
    "model.fuse_norm_attn_norm": "the same layers, whose names checkpoints are read with",
    "model.param_init_fn": "init_config says it",
    "model.init_nonlinearity": "init_config says it",
    "model.ffn_config.fc_type": "linear layers are torch's",
    "model.ffn_config.moe_lbl_in_fp32": "the balance loss is always float32",
    "model.ffn_config.moe_zloss_in_fp32": "the z-loss is always float32",
    "model.ffn_config.memory_optimized_mlp": "only the layer's input and hidden activations are kept",
    "model.ffn_config.return_bias": "",
    "model.use_train_metrics": "the training loss is always logged",
    "model.additional_train_metrics": "the training loss is always logged",
    "model.activation_checkpointing_target": "parallel.recompute names what is computed again",
    "model.attn_config.fused_qkv": "one matrix in any case",
    "model.ffn_config.remat_act_fn": "",
    "model.ffn_config.fp16": "precision says it",
    "model.ffn_config.bf16": "precision says it",
    "model.ffn_config.device": "",
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
    "device_train_grad_accum": "device_train_microbatch_size says it",
    **{
        f"{loader}.{key}": ""
        for loader in ("train_loader", "eval_loader")
        for key in ("pin_memory", "prefetch_factor", "persistent_workers", "timeout")
    },
}
# Keys that do change values, with the only value that means what we do.
_ONLY = {
    "model.attn_config.prefix_lm": (False,),
    "model.loss_fn": ("fused_crossentropy", "torch_crossentropy"),
    "model.use_cache": (True, False),
    "model.use_pad_tok_in_ffn": (True,),
    "model.ffn_config.moe_weight_parallelism": (False,),
    "model.ffn_config.moe_expert_model_parallelism": (True, False),
    "model.attn_config.nope": (False,),
    "model.attn_config.attn_temperature_tuning": (None, False, {"floor_scale": 8192, "attn_scale": 0.0}),
    "model.ffn_config.expert_parallel_group": (None,),
    "model.ffn_config.pipeline_model_parallel_size": (1,),
    "model.ffn_config.num_layers_per_virtual_pipeline_stage": (None,),
    "model.ffn_config.shared_expert_weighted_sum": (False,),
    "save_filename": ("ep{epoch}-ba{batch}-rank{rank}.pt",),
    "save_latest_filename": ("latest-rank{rank}.pt",),
    "save_weights_only": (False,),
    "load_strict_model_weights": (True,),
    "load_ignore_keys": (None,),
    "only_hf_checkpoint": (False,),
    "only_composer_checkpoint": (False,),
    "accumulate_train_batch_on_tokens": (True,),
    "spin_dataloaders": (True,),
    "train_subset_num_batches": (-1,),
    "profiler": (None,),
    "tp_config": (None,),
}
# Keys of the top level that only serve `${...}`: the file's references are already resolved.
_VARIABLES = ("dataset", "global_seed", "icl_max_seq_len")
_DURATIONS = ("max_duration", "eval_interval", "save_interval", "console_log_interval")
_SCHEDULE = ("t_warmup", "t_max", "t_scale", "t_cooldown")


def translate(data: Tree) -> tuple[Tree, list[str]]:
    """A YAML in LLM Foundry v0.22's words, in ours.

    Args:
        data: what `load_yaml` returned; not changed.

    Returns:
        The same run in our words, and a line for each thing that was translated.

    Raises:
        ConfigError: a line for each legacy key that asks for what this framework does not do.
    """
    theirs = _is_theirs(data)
    data, notes, mistakes = copy.deepcopy(data), [], []
    for path, allowed in _ONLY.items():
        value, present = _look(data, path)
        if not present:
            continue
        _take(data, path)
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            notes.append(f"{path}={value!r}: left out, it is what this framework does")
        else:
            mistakes.append(f"{path}: {value!r} is not supported; remove it, or write {allowed[0]!r}")
    for path, why in _GONE.items():
        if _look(data, path)[1]:
            value = _take(data, path)
            notes.append(f"{path}={value!r}: left out, it changes no value" + (f"; {why}" if why else ""))
    for path in (path for path in _VARIABLES if path in data):
        notes.append(f"{path}={_take(data, path)!r}: left out, it only serves references")
    for path, values in _RENAMED_VALUES.items():
        value, present = _look(data, path)
        if present and isinstance(value, str) and value in values:
            _put(data, path, values[value])
            notes.append(f"{path}: {value} is now {values[value]}")
    for path in (*_DURATIONS, *(f"scheduler.{key}" for key in _SCHEDULE)):
        value, present = _look(data, path)
        if present and (new := _duration(value)) is not None:
            notes.append(f"{path}={value!r}: is now {_put(data, path, new)}")
    for path, apply in _MOVED.items():
        value, present = _look(data, path)
        if present:
            _take(data, path)
            try:
                for new in apply(data, value):
                    notes.append(f"{path}={value!r}: {new if new.startswith('left out') else f'is now {new}'}")
            except ConfigError as error:
                mistakes.append(str(error))
    if theirs:  # in a file of ours, a missing save_folder is a mistake
        for fill in (_made_up_name, _temporary_folder, _packed, _head_norms):
            try:
                notes += fill(data)
            except ConfigError as error:
                mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return data, notes


def _is_theirs(data: Tree) -> bool:
    """Whether a file is one of LLM Foundry's, and not one of ours with some of their words."""
    model = data.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    return "fsdp_config" in data or name in ("mpt_causal_lm", "hf_causal_lm", "hf_t5")


def _made_up_name(data: Tree) -> list[str]:
    """Name a run without a name whose save folder holds `{run_name}`."""
    folder = data.get("save_folder")
    if data.get("run_name") is not None or "RUN_NAME" in os.environ or "{run_name}" not in str(folder):
        return []
    data["run_name"] = f"run-{_launcher('run_name')}"
    return [f"run_name: is missing; made up {data['run_name']}: write run_name=... to resume this run later"]


def _temporary_folder(data: Tree) -> list[str]:
    """Set the save folder of a file that has none to one that all ranks of this node agree on."""
    if data.get("save_folder") is not None:
        return []
    folder = Path(tempfile.gettempdir()) / f"llmfoundry-{_launcher('save_folder')}"
    data |= {"save_folder": str(folder), "save_interval": "0ba"}
    return [f"save_folder: is missing; the last checkpoint and the logs go to {folder}: write save_folder=... instead"]


def _packed(data: Tree) -> list[str]:
    """Keep examples that share a row apart, which is what packing means here."""
    ratio = _look(data, "train_loader.dataset.packing_ratio")[0]
    if ratio is None or _look(data, "model.attn_config.attn_uses_sequence_id")[0] is True:
        return []
    if _look(data, "model.name")[0] == "transformers":
        return [f"train_loader.dataset.packing_ratio={ratio!r}: left out; each example has a row of its own, for the "
                "module of transformers keeps no documents apart"]  # fmt: skip
    said = _put(data, "model.attn_config.attn_uses_sequence_id", True)
    return [f"train_loader.dataset.packing_ratio={ratio!r}: is now {said}; examples that share a row are kept apart"]


def _head_norms(data: Tree) -> list[str]:
    """Give queries and keys the norm that they have there."""
    model = data.get("model")
    return foundry_model.layer_norm(model) if isinstance(model, dict) else []


def _launcher(key: str) -> int:
    """A number that all ranks of this node agree on: the process that started them.

    Raises:
        ConfigError: the run has several nodes, which have none in common.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > int(os.environ.get("LOCAL_WORLD_SIZE", world)):
        raise ConfigError(f"{key}: is missing, and several nodes must agree on it; write {key}=...")
    return os.getppid() if world > 1 else os.getpid()


def _duration(value: object) -> str | None:
    """Composer's other spellings of a duration, in ours.

    A number counts epochs, `iter` are steps here, `90sec` are 90s and `1h30m` or `1h0m30s` so many seconds.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return f"{value}ep"
    if not isinstance(value, str):
        return None
    if match := re.fullmatch(r"(\d+)(iter|sec)", value):
        return f"{match[1]}{'ba' if match[2] == 'iter' else 's'}"
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value)
    if match is None or sum(part is not None for part in match.groups()) < 2 and not value.endswith("m"):
        return None
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return f"{hours * 3600 + minutes * 60 + seconds}s"


_RENAMED_VALUES = {
    "model.attn_config.attn_impl": {"flash": "auto", "torch": "sdpa"},
    "model.norm_type": {"triton_rmsnorm": "rmsnorm"},
}


def _mixed_precision(data: Tree, value: object) -> list[str]:
    """What FSDP computes and reduces in there; here parameters are cast by `precision` and sums are float32."""
    if value == "FULL" and data.get("precision") != "fp32":
        raise ConfigError(
            "fsdp_config.mixed_precision: FULL computes in float32; write precision: fp32 and leave it out"
        )
    if value not in ("PURE", "DEFAULT", "FULL"):
        raise ConfigError(f"fsdp_config.mixed_precision: {value!r} is not supported; write PURE or DEFAULT")
    return ["left out; gradients are summed in float32 (PURE sums them in bfloat16 there)"]


def _model(data: Tree, value: object) -> list[str]:
    """`model.name`: models of Hugging Face, and the one family that nothing here can train."""
    if value == "hf_t5":
        _put(data, "model", {"name": "causal_lm"})
        raise ConfigError("model.name: hf_t5: encoder-decoder models are not trained here; choose a causal model")
    _put(data, "model.name", value)
    return hugging_face_model(data) if value == "hf_causal_lm" else []


def _compile(data: Tree, value: object) -> list[str]:
    if value is None:
        return ["left out, nothing is compiled"]
    if value != {}:
        raise ConfigError(f"compile_config: {value!r} is not supported; write parallel: {{compile: true}}")
    return [_put(data, "parallel.compile", True)]


def _renamed(path: str) -> Callable[[Tree, object], list[str]]:
    return lambda data, value: [_put(data, path, value)]


def _loss_group(data: Tree, value: object) -> list[str]:
    if value == "global_group":
        return [_put(data, "model.ffn_config.moe_lbl_scope", "global_batch")]
    if value in (None, "none", "expert_group"):
        return ["left out; moe_lbl_scope says over which tokens the load is counted"]
    raise ConfigError(f"model.ffn_config.lbl_process_group: unknown {value!r}; write global_group, or leave it out")


def _fsdp(data: Tree, value: object) -> list[str]:
    """`fsdp_config`, Composer's FSDP1 settings."""
    if value is None:
        return ["nothing, it was empty"]
    if not isinstance(value, dict):
        raise ConfigError(f"fsdp_config: must be a mapping, found {value!r}")
    said, rest = [], dict(value)
    for theirs, ours in (("data_parallel_shard_degree", "shard"), ("data_parallel_replicate_degree", "replicate")):
        if theirs in rest:
            said.append(_put(data, f"parallel.{ours}", rest.pop(theirs)))
    strategy = rest.pop("sharding_strategy", "FULL_SHARD")
    if strategy not in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"):
        raise ConfigError(f"fsdp_config.sharding_strategy: unknown {strategy!r}")
    if strategy == "HYBRID_SHARD":
        raise ConfigError("fsdp_config.sharding_strategy: HYBRID_SHARD does not say how many copies; write "
                          "parallel: {replicate: <copies of the model>} instead")  # fmt: skip
    if strategy == "SHARD_GRAD_OP":
        said.append(_put(data, "parallel.reshard_after_forward", False))
    if strategy == "NO_SHARD":
        raise ConfigError("fsdp_config.sharding_strategy: NO_SHARD is written parallel: {replicate: <ranks>, shard: 1}")
    if rest.pop("activation_checkpointing", False):
        said.append(_put(data, "parallel.recompute", "full"))
    if rest.pop("activation_cpu_offload", False):
        raise ConfigError("fsdp_config.activation_cpu_offload: is not supported; use parallel.recompute")
    if rest.pop("cpu_offload", False):
        said.append(_put(data, "parallel.cpu_offload", True))
    for key in ("activation_checkpointing_reentrant", "backward_prefetch", "forward_prefetch", "limit_all_gathers",
                "use_orig_params", "verbose", "state_dict_type", "sync_module_states", "auto_wrap",
                "flatten_parameters", "load_planner", "save_planner", "te_checkpoint_wrapper"):  # fmt: skip
        rest.pop(key, None)
    if rest:
        raise ConfigError(f"fsdp_config.{min(rest)}: unknown key")
    return said or ["parallel with its defaults"]


def _moe_world_size(data: Tree, value: object) -> list[str]:
    return [_put(data, "parallel.expert", value)]


def _capacity(data: Tree, value: object) -> list[str]:
    """MegaBlocks' dMoE drops nothing, whatever this says; its MoE (`mb_moe`) takes it at its word."""
    if value and _look(data, "model.ffn_config.ffn_type")[0] != "mb_moe":
        return ["left out: a dropless mixture has no capacity (mb_moe has)"]
    _put(data, "model.ffn_config.moe_capacity_factor", value)
    return []


def _off_at_zero(path: str) -> Callable[[Tree, object], list[str]]:
    """A key whose 0 means the same as leaving it out there."""

    def moved(data: Tree, value: object) -> list[str]:
        if isinstance(value, (int, float)) and value == 0:
            return ["left out: 0 is off"]
        _put(data, path, value)
        return []

    return moved


def _rope_hf(data: Tree, value: object) -> list[str]:
    if not isinstance(value, dict):
        raise ConfigError(f"model.attn_config.rope_hf_config: must be a mapping, found {value!r}")
    kind = value.get("type", "no_scaling")
    if kind == "no_scaling":
        return ["no scaling"]
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(
            f"model.attn_config.rope_hf_config.type: {kind!r} is not supported; known: linear, llama3, yarn"
        )
    return [_put(data, "model.attn_config.rope_scaling", value)]


def _learned_pos_emb(data: Tree, value: object) -> list[str]:
    """LLM Foundry's default is true, and it turns that off where attention has positions of its own."""
    own = [key for key in ("rope", "alibi") if _look(data, f"model.attn_config.{key}")[0]]
    if value and own:
        return [f"off, as in LLM Foundry where attn_config.{own[0]} is on"]
    _put(data, "model.learned_pos_emb", value)  # as it was: nothing to say
    return []


def _wandb_name(data: Tree, value: object) -> list[str]:
    """There it names the run; here `name` is the logger's own, as config.yaml writes it out."""
    if value == "wandb":
        _put(data, "loggers.wandb.name", value)
        return []
    return [_put(data, "loggers.wandb.run_name", value)]


def _eval_workers(data: Tree, value: object) -> list[str]:
    return ["0, evaluation reads as it goes"] if value else []


def _of_model(apply: Callable[[Tree, object], list[str]]) -> Callable[[Tree, object], list[str]]:
    """A change of the block `model`."""

    def moved(data: Tree, value: object) -> list[str]:
        model = data["model"]
        assert isinstance(model, dict)
        return apply(model, value)

    return moved


_MOVED: dict[str, Callable[[Tree, object], list[str]]] = {
    "model.ffn_config.moe_world_size": _moe_world_size,
    "model.ffn_config.moe_capacity_factor": _capacity,
    **{
        path: _off_at_zero(path)
        for path in ("model.ffn_config.moe_jitter_eps", "model.ffn_config.moe_normalize_expert_weights")
    },
    "model.attn_config.rope_impl": _of_model(foundry_model.rope_impl),  # before those that it may take away
    "model.attn_config.rope_dail_config": _of_model(foundry_model.rope_dail),
    "model.attn_config.rope_hf_config": _rope_hf,
    "model.learned_pos_emb": _learned_pos_emb,
    "model.block_overrides": _of_model(foundry_model.block_overrides),
    "model.head_dim": _of_model(foundry_model.head_dim),
    "model.attn_config.qk_gn": _of_model(foundry_model.group_norm),
    "model.attn_config.kv_dim": _of_model(foundry_model.kv_dim),
    "model.attn_config.clip_qkv": _off_at_zero("model.attn_config.clip_qkv"),
    "eval_loader.num_workers": _eval_workers,
    "loggers.wandb.name": _wandb_name,
    "model.name": _model,
    "model.attention_bias": _renamed("model.attn_config.bias"),
    "model.ffn_config.lbl_process_group": _loss_group,
    "compile_config": _compile,
    "fsdp_config.mixed_precision": _mixed_precision,
    "fsdp_config": _fsdp,
}


def _look(data: Tree, path: str) -> tuple[object, bool]:
    """The value at a dotted path, and whether there is one."""
    node: object = data
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return None, False
        node = node[part]
    return node, True


def _take(data: Tree, path: str) -> object:
    parent, _, key = path.rpartition(".")
    node = _look(data, parent)[0] if parent else data
    assert isinstance(node, dict)
    return node.pop(key)


def _put(data: Tree, path: str, value: object) -> str:
    """Set a value; returns what was set, in words."""
    *parents, key = path.split(".")
    node = data
    for part in parents:
        child = node.setdefault(part, {})
        assert isinstance(child, dict)
        node = child
    node[key] = value
    return f"{path}: {value}"
