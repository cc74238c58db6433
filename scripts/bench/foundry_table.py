"""What LLM Foundry's keys become, for docs/from-llm-foundry.md: each row is what the translation itself answers."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


from llmfoundry.config import ConfigError  # noqa: E402
from llmfoundry.integrations.foundry_keys import GONE, ONLY, REFUSED  # noqa: E402
from llmfoundry.integrations.foundry_yaml import translate  # noqa: E402

EXAMPLES = ROOT / "tests" / "integrations" / "foundry"
# A value for each key that becomes another one.
_CHANGED = {
    "max_duration": [2, "300iter"],
    "eval_interval": [1, 0],
    "fsdp_config.sharding_strategy": ["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"],
    "fsdp_config.mixed_precision": ["PURE", "FULL", {"param_dtype": "bf16", "reduce_dtype": "fp32"}],
    "fsdp_config.device_mesh": [[2, 8]],
    "fsdp_config.activation_checkpointing": [True],
    "fsdp_config.cpu_offload": [True],
    "fsdp_config.data_parallel_shard_degree": [8],
    "fsdp_config.data_parallel_replicate_degree": [2],
    "compile_config": [{}, None],
    "model.attention_bias": [True],
    "model.head_dim": [128],
    "model.attn_config.rope_impl": ["dail"],
    "model.norm_type": ["triton_rmsnorm"],
    "model.attn_config.qk_gn": [True],
    "model.attn_config.attn_impl": ["flash", "torch"],
    "model.attn_config.rope_hf_config": [{"type": "linear", "factor": 2.0}],
    "model.ffn_config.moe_world_size": [8],
    "model.ffn_config.moe_capacity_factor": [1.25],
    "model.ffn_config.moe_jitter_eps": [0],
    "model.ffn_config.lbl_process_group": ["global_group", "expert_group"],
    "train_loader.dataset.packing_ratio": ["auto"],
}
_FOREIGN = {"model": {"name": "mpt_causal_lm", "attn_config": {"rope_impl": "hf"}}, "run_name": "a", "save_folder": "b"}


def foundry_changed() -> str:
    """Keys that become others."""
    rows = ["| LLM Foundry | here |", "|---|---|"]
    for path, values in _CHANGED.items():
        for value in values:
            rows.append(f"| `{path}: {_said(value)}` | {_answer(path, value)} |")
    return "\n".join(rows)


def _answer(path: str, value: object) -> str:
    data = yaml.safe_load(yaml.safe_dump(_FOREIGN))
    *parents, key = path.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
    node[key] = value
    try:
        _, notes = translate(data)
    except ConfigError as error:
        return f"refused: {str(error).partition(': ')[2]}"
    found = [note.said.removeprefix("is now ") for note in notes if note.path == path]
    if not found and parents:  # a whole block is translated by one note
        found = [note.said.removeprefix("is now ") for note in notes if note.path == parents[-1]]
    marked = [re.sub(r"^([\w.]+: [\w.{}\"', :-]+)", r"`\1`", each, count=1) for each in found]
    return "; ".join(marked) or "the same"


def foundry_gone() -> str:
    """Keys that are left out with a note, by the reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for path, why in GONE.items():
        by_reason[why or "tuned an implementation"].append(f"`{path}`")
    rows = ["| keys | why they change nothing here |", "|---|---|"]
    return "\n".join(rows + [f"| {', '.join(paths)} | {why} |" for why, paths in by_reason.items()])


def foundry_only() -> str:
    """Keys that are accepted at one value."""
    rows = ["| key | accepted |", "|---|---|"]
    return "\n".join(rows + [f"| `{path}` | {', '.join(f'`{_said(v)}`' for v in ONLY[path])} |" for path in ONLY])


def foundry_refused() -> str:
    """Keys that are not built, with what to write instead."""
    rows = ["| key | what its error says |", "|---|---|"]
    return "\n".join(rows + [f"| `{path}` | {why} |" for path, why in REFUSED.items()])


def _said(value: object) -> str:
    return "null" if value is None else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def foundry_diff() -> str:
    """The block that turns a dense MPT file of theirs into a mixture."""
    dense = (EXAMPLES / "pretrain_mpt.yaml").read_text(encoding="utf-8").splitlines()
    at = dense.index("  attn_config:")
    block = ["  ffn_config:", "    ffn_type: mb_dmoe", "    moe_num_experts: 8", "    moe_top_k: 2"]
    lines = difflib.unified_diff(dense, [*dense[:at], *block, *dense[at:]], "mpt.yaml", "moe.yaml", n=2, lineterm="")
    return "\n".join(["```diff", *(line for line in lines if not line.startswith("@@")), "```"])
