"""The shipped YAMLs in a size that a test trains in a second: the same keys, small numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from llmfoundry.settings import load_yaml


def shrunk(path: Path, changes: Mapping[str, object]) -> DictConfig:
    """A YAML with small sizes and these changes, by dotted key, put over them; None leaves a block empty."""
    config = load_yaml(path)
    smaller: dict[str, object] = {
        "variables.max_seq_len": 32,
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "model.n_layers": 2, "model.d_model": 64, "model.n_heads": 4, "model.vocab_size": 320,
        "model.ffn_config.ffn_hidden_size": 32,
        "scheduler.t_warmup": "1ba", "max_duration": "2ba",
        "global_train_batch_size": 4, "device_train_microbatch_size": 2, "parallel": {}, "callbacks": {},
    }  # fmt: skip
    if "kv_n_heads" in config["model"]["attn_config"]:
        smaller |= {"model.attn_config.kv_n_heads": 2, "model.attn_config.head_dim": 16}
    if "moe_num_experts" in config["model"]["ffn_config"]:
        smaller |= {"model.ffn_config.moe_num_experts": 8, "model.ffn_config.moe_top_k": 2}
    made = OmegaConf.load(path)
    assert isinstance(made, DictConfig)
    for key, value in (smaller | dict(changes)).items():
        OmegaConf.update(made, key, value, merge=False)
    return made
