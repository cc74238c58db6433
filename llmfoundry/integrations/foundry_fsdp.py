"""Translates `fsdp_config`, Composer's FSDP1 settings: the mesh, activation checkpointing and reduction dtypes."""

from __future__ import annotations

from collections.abc import Mapping

from llmfoundry.config import ConfigError
from llmfoundry.integrations.foundry_tree import Tree, put

# Keys that tune FSDP1, or set the layout of its files.
_GONE = {
    "activation_checkpointing_reentrant", "auto_microbatching", "auto_wrap", "backward_prefetch",
    "backward_prefetch_limit", "flatten_parameters", "forward_prefetch", "forward_prefetch_limit",
    "keep_low_precision_grads", "limit_all_gathers", "load_fsdp_monolith_rank0_only", "load_monolith_rank0_only",
    "load_planner", "min_params", "save_planner", "sharded_ckpt_prefix_dir", "state_dict_type", "sync_module_states",
    "te_checkpoint_wrapper", "te_shard_fp8_weight", "use_orig_params", "verbose",
}  # fmt: skip
_NULL = "ignored_modules", "process_group"  # other values would wrap other modules, or use other ranks
_SWITCHES = "activation_checkpointing", "activation_cpu_offload", "cpu_offload"
_STRATEGIES = "FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"
_BF16 = "bf16", "bfloat16", "amp_bf16"
_FP32 = "fp32", "float32"


def fsdp(data: Tree, value: object) -> list[str]:
    """Translate the whole block.

    Raises:
        ConfigError: with one line per key that requests something unsupported.
    """
    if value is None:
        return ["nothing, it was empty"]
    if not isinstance(value, dict):
        raise ConfigError(f"fsdp_config: must be a mapping, found {value!r}")
    rest: Tree = {key: each for key, each in value.items() if key not in _GONE}
    wrong = [key for key in _SWITCHES if not isinstance(rest.get(key), bool | None)]
    no_switch = [f"{key}: must be true or false, found {rest.pop(key)!r}" for key in wrong]
    said, mistakes = _mesh(data, rest)
    mistakes = no_switch + mistakes
    if rest.pop("activation_checkpointing", False):
        said.append(put(data, "parallel.recompute", "full"))
    if rest.pop("activation_cpu_offload", False):
        mistakes.append("activation_cpu_offload: is not supported; use parallel.recompute")
    if rest.pop("cpu_offload", False):
        said.append(put(data, "parallel.cpu_offload", True))
    for key in _NULL:
        if (found := rest.pop(key, None)) is not None:
            mistakes.append(f"{key}: {found!r} is not supported; leave it out")
    mistakes += [f"{key}: unknown key" for key in rest]
    if mistakes:
        raise ConfigError("\n".join(f"fsdp_config.{mistake}" for mistake in mistakes))
    return said or ["parallel with its defaults"]


def _mesh(data: Tree, rest: Tree) -> tuple[list[str], list[str]]:
    """Translate the number of shards and replicas, removing the keys from `rest`. Returns notes and mistakes."""
    said, mistakes = [], []
    mesh = rest.pop("device_mesh", None)
    degrees = {"shard": rest.pop("data_parallel_shard_degree", None),
               "replicate": rest.pop("data_parallel_replicate_degree", None)}  # fmt: skip
    if isinstance(mesh, list) and len(mesh) in (1, 2):
        degrees |= dict(zip(("shard", "replicate"), reversed(mesh), strict=False))
    elif mesh is not None:
        mistakes.append(f"device_mesh: {mesh!r} is not supported; write parallel: {{replicate: ..., shard: ...}}")
    said += [put(data, f"parallel.{key}", degree) for key, degree in degrees.items() if degree is not None]
    strategy = rest.pop("sharding_strategy", None) or "FULL_SHARD"
    strategy = strategy.upper() if isinstance(strategy, str) else strategy
    if strategy not in _STRATEGIES:
        mistakes.append(f"sharding_strategy: unknown {strategy!r}; known: {', '.join(_STRATEGIES)}")
    elif strategy == "SHARD_GRAD_OP":
        said.append(put(data, "parallel.reshard_after_forward", False))
    elif strategy == "NO_SHARD":
        mistakes.append("sharding_strategy: NO_SHARD is written parallel: {replicate: <ranks>, shard: 1}")
    elif strategy == "HYBRID_SHARD" and degrees["replicate"] is None:
        mistakes.append("sharding_strategy: HYBRID_SHARD does not say how many copies; write parallel: {replicate: "
                        "<copies of the model>} instead")  # fmt: skip
    return said, mistakes


def mixed_precision(data: Tree, value: object) -> list[str]:
    """Translate FSDP1's compute and reduce dtypes; here `precision` sets the compute dtype, and sums are float32."""
    computes = value
    if isinstance(value, Mapping):
        computes = "FULL" if value.get("param_dtype", "fp32") in (*_FP32, None) else "PURE"
        for key in ("param_dtype", "reduce_dtype", "buffer_dtype"):
            if value.get(key) not in (*_BF16, *_FP32, None):
                raise ConfigError(f"fsdp_config.mixed_precision.{key}: {value[key]!r} is not supported; write bf16")
    if not isinstance(computes, str) or computes.upper() not in ("PURE", "DEFAULT", "FULL"):
        raise ConfigError(f"fsdp_config.mixed_precision: {value!r} is not supported; write PURE or DEFAULT")
    if computes.upper() == "FULL" and data.get("precision") != "fp32":
        raise ConfigError(
            f"fsdp_config.mixed_precision: {value} computes in float32; write precision: fp32 and leave it out"
        )
    return ["left out; gradients are summed in float32 (PURE sums them in bfloat16 there)"]
