"""LLM Foundry's legacy words, translated out loud.

What kept its meaning needs no translation. Here stands what was renamed, moved, or has nothing left to say; every
change is a line of notes, and whatever would alter the result without an equivalent is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from llmfoundry.config import ConfigError

Tree = dict[str, object]

# Keys that tuned an implementation and change no value. They go, with a note.
_GONE = {
    "python_log_level": "logs are at level INFO",
    "max_split_size_mb": "set PYTORCH_ALLOC_CONF instead",
    "expandable_segments": "set PYTORCH_ALLOC_CONF instead",
    "callbacks.runtime_estimator": "the console shows the time that is left",
    "callbacks.scheduled_gc": "collections are not forced",
    "model.init_device": "models are always built on meta",
    "model.fc_type": "linear layers are torch's",
    "model.attn_config.rope_dail_config": "",
    "model.ffn_config.fc_type": "linear layers are torch's",
    "model.ffn_config.moe_lbl_in_fp32": "the balance loss is always float32",
    "model.ffn_config.moe_zloss_in_fp32": "the z-loss is always float32",
    "model.ffn_config.memory_optimized_mlp": "only the layer's input and hidden activations are kept",
    "model.ffn_config.return_bias": "",
    "train_loader.pin_memory": "",
    "train_loader.prefetch_factor": "",
    "train_loader.persistent_workers": "",
    "train_loader.timeout": "",
}
# Keys that do change values, with the only value that means what we do.
_ONLY = {
    "model.attn_config.attn_pdrop": (0, 0.0),
    "model.attn_config.rope_impl": ("dail", "hf"),
    "model.attn_config.prefix_lm": (False,),
    "model.attn_config.qk_gn": (False,),
    "model.resid_pdrop": (0, 0.0),
    "model.emb_pdrop": (0, 0.0),
    "model.logit_scale": (None,),
    "model.loss_fn": ("fused_crossentropy", "torch_crossentropy"),
    "model.use_cache": (True, False),
    "model.use_pad_tok_in_ffn": (True,),
    "model.ffn_config.moe_weight_parallelism": (False,),
    "model.ffn_config.moe_expert_model_parallelism": (True, False),
    "fsdp_config.mixed_precision": ("PURE", "DEFAULT", "FULL"),
}


def translate(data: Tree) -> tuple[Tree, list[str]]:
    """A YAML in LLM Foundry v0.22's words, in ours.

    Args:
        data: what `load_yaml` returned; not changed.

    Returns:
        The same run in our words, and a line for each thing that was translated.

    Raises:
        ConfigError: a legacy key asks for what this framework does not do.
    """
    data, notes = copy.deepcopy(data), []
    for path, allowed in _ONLY.items():
        value, present = _look(data, path)
        if present and value not in allowed:
            raise ConfigError(f"{path}: {value!r} is not supported; remove it, or write {allowed[0]!r}")
        if present:
            _take(data, path)
            notes.append(f"{path}={value!r}: left out, it is what this framework does")
    for path, why in _GONE.items():
        if _look(data, path)[1]:
            value = _take(data, path)
            notes.append(f"{path}={value!r}: left out, it changes no value" + (f"; {why}" if why else ""))
    for path, values in _RENAMED_VALUES.items():
        value, present = _look(data, path)
        if present and isinstance(value, str) and value in values:
            _put(data, path, values[value])
            notes.append(f"{path}: {value} is now {values[value]}")
    for path, apply in _MOVED.items():
        value, present = _look(data, path)
        if present:
            _take(data, path)
            notes += [f"{path}={value!r}: is now {new}" for new in apply(data, value)]
    return data, notes


_RENAMED_VALUES = {
    "model.attn_config.attn_impl": {"flash": "auto", "torch": "sdpa"},
}


def _fsdp(data: Tree, value: object) -> list[str]:
    """`fsdp_config`, Composer's FSDP1 settings."""
    if value is None:
        return ["nothing, it was empty"]
    if not isinstance(value, dict):
        raise ConfigError(f"fsdp_config: must be a mapping, found {value!r}")
    said, rest = [], dict(value)
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


def _eval_workers(data: Tree, value: object) -> list[str]:
    return ["0, evaluation reads as it goes"] if value else []


_MOVED: dict[str, Callable[[Tree, object], list[str]]] = {
    "model.ffn_config.moe_world_size": _moe_world_size,
    "model.ffn_config.moe_capacity_factor": _capacity,
    "model.attn_config.rope_hf_config": _rope_hf,
    "model.learned_pos_emb": _learned_pos_emb,
    "eval_loader.num_workers": _eval_workers,
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
