"""Checkpoints in LLM Foundry's layout, as Composer writes them, made with plain torch from models of ours.

The names and layouts are written out here a second time, as loops over experts, so that they check the rules.
"""

from __future__ import annotations

import datetime
import json
import random
import re
from pathlib import Path

import numpy
import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llmfoundry.integrations.composer_checkpoint import model_config
from llmfoundry.model.transformer import CausalLM

TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
BASE = {
    "name": "mpt_causal_lm", "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "vocab_size": 50,
    "max_seq_len": 16,
}  # fmt: skip
EXPERTS = {"moe_num_experts": 4, "moe_top_k": 2}
MODELS: dict[str, dict[str, object]] = {
    "dense": BASE,
    "glu": {
        **BASE, "no_bias": True, "tie_word_embeddings": False,
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 1, "rope": True, "qk_ln": True},
        "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}},
    },
    "rms": {**BASE, "norm_type": "low_precision_rmsnorm", "norm_eps": 1e-6},
    "dmoe": {**BASE, "attn_config": {"alibi": True}, "ffn_config": {"ffn_type": "mb_dmoe", **EXPERTS}},
    "dmoe_glu": {
        **BASE, "no_bias": True,
        "ffn_config": {
            "ffn_type": "mb_dmoe", "mlp_type": "glu", "shared_expert": True, "shared_expert_hidden_size": 8, **EXPERTS
        },
    },
    "moe": {**BASE, "ffn_config": {"ffn_type": "mb_moe", "moe_capacity_factor": 0, **EXPERTS}},
    "unfused": {
        **BASE, "attn_config": {"attn_type": "multiquery_attention", "rope": True, "qk_gn": True, "fused_qkv": False},
    },
    "wrapped": {  # as in LLM Foundry's YAMLs that evaluate DBRX
        **BASE, "no_bias": True, "fuse_norm_attn_norm": True, "param_init_fn": "kaiming_normal_",
        "init_nonlinearity": "relu", "ffn_config": {"ffn_type": "torch_dmoe", "mlp_type": "glu", **EXPERTS},
    },
    "reuse": {
        **BASE, "attn_config": {"rope": True, "qk_ln": True}, "logit_scale": "inv_sqrt_d_model",
        "block_overrides": {
            "order": [{"name": "default"}, {"name": "reuse"}],
            "overrides": {"reuse": {"attn_config": {"reuse_kv_layer_idx": -1, "sliding_window_size": 4}}},
        },
    },
}  # fmt: skip


def build(model: dict[str, object]) -> CausalLM:
    """A model of ours with random weights, all of them."""
    made = model_config(model, "test").build()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.eval()


def logits(model: CausalLM) -> Tensor:
    with torch.no_grad():
        found = model(TOKENS).logits
    assert found is not None
    return found


def theirs(model: CausalLM, stacked: bool = True, fused: bool = True, wrapped: bool = False) -> dict[str, Tensor]:
    """The weights under the names of LLM Foundry's MPT.

    Args:
        stacked: experts as MegaBlocks' dMoE has them, (E F, D); else as its MoE, (E, D, F) and (E, F, D).
        fused: queries, keys and values as one matrix.
        wrapped: norms and attention of a layer in one module, as `fuse_norm_attn_norm` has them.
    """
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        name = name.replace("attn.wqkv", "attn.Wqkv").replace("attn.q_norm", "attn.q_ln")
        name = name.replace("attn.k_norm", "attn.k_ln").replace("ffn.router.", "ffn.router.layer.")
        name = name.replace("ffn.output_bias", "ffn.experts.bias")
        name = name.replace("attn.wq.", "attn.Wq.")
        if not fused and ".Wqkv." in name:
            heads = value.shape[0] - 2 * 8  # one head of keys, one of values
            for part, rows in zip("qkv", value.split((heads, 8, 8)), strict=True):
                found[name.replace("Wqkv", f"W{part}")] = rows
            continue
        block, _, last = name.rpartition(".ffn.")
        if last == "experts.w2":
            found[f"{block}.ffn.experts.mlp.w2"] = _stack([w.t() for w in value], stacked)
        elif last == "experts.w1":
            gated = model.config.ffn(0).gated
            halves = [w.chunk(2) if gated else (w,) for w in value]
            for i, matrix in enumerate(("w1", "v1") if gated else ("w1",)):
                parts = [half[i] for half in halves]
                found[f"{block}.ffn.experts.mlp.{matrix}"] = _stack(
                    parts if stacked else [p.t() for p in parts], stacked
                )
        elif "w1." in last:
            parts = value.chunk(2) if model.config.ffn(0).gated else (value,)
            for matrix, part in zip(("up_proj",) if len(parts) == 1 else ("gate_proj", "up_proj"), parts, strict=True):
                found[name.replace("w1", matrix)] = part.clone()
        else:
            found[name.replace(".w2.", ".down_proj.")] = value
    if wrapped:
        found = {
            re.sub(r"^(blocks\.\d+)\.(norm_|attn\.)", r"\1.norm_attn_norm.\2", name): v for name, v in found.items()
        }
    return {f"model.{'' if name.startswith('lm_head') else 'transformer.'}{name}": v for name, v in found.items()}


def _stack(parts: list[Tensor], stacked: bool) -> Tensor:
    return torch.cat(parts) if stacked else torch.stack(parts)


def composer_state(weights: dict[str, Tensor], integrations: dict[str, object] | None = None) -> dict[str, object]:
    """What Composer saves around the weights, with one of each kind of object that it leaves in there."""
    about = {"torch_version": torch.torch_version.TorchVersion(torch.__version__), "world_size": 1}
    return {
        "state": {
            "model": weights,
            "optimizers": {"DecoupledAdamW": {"state": {}, "param_groups": []}},
            "timestamp": {"Timestamp": {"batch": 2, "total_wct": datetime.timedelta(seconds=3)}},
            "algorithms": [("GradientClipping", {"repr": "GradientClipping()"})],
            "callbacks": {},
            "integrations": integrations or {},
            "metadata": about,
        },
        "rng": [{"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}],
    }


def write_sharded(folder: Path, state: dict[str, object]) -> Path:
    """A folder as FSDP's sharded checkpoints are, from one process."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def tokenizer_files(folder: Path) -> dict[str, dict[str, object]]:
    """A tiny tokenizer as Composer stores one: JSON parsed, text in lines."""
    words = {"<end>": 0} | {chr(33 + i): 1 + i for i in range(45)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>").save_pretrained(folder)
    return {
        file.name: {"file_extension": file.suffix, "content": json.loads(file.read_text())}
        for file in folder.glob("*.json")
    }


def foundry_config(model: dict[str, object]) -> dict[str, object]:
    """A config.json as LLM Foundry's MPTConfig writes it: its defaults filled in, and what `transformers` adds."""
    defaults = {
        "model_type": "mpt", "architectures": ["MPTForCausalLM"], "transformers_version": "4.51.3",
        "_attn_implementation_autoset": True, "torch_dtype": "float32", "is_decoder": False, "return_dict": True,
        "resid_pdrop": 0.0, "emb_pdrop": 0.0, "learned_pos_emb": True, "init_device": "meta", "logit_scale": None,
        "no_bias": False, "embedding_fraction": 1.0, "norm_type": "low_precision_layernorm", "norm_eps": 1e-5,
        "use_cache": False, "fc_type": {"name": "torch"}, "use_pad_tok_in_ffn": True, "block_overrides": None,
        "final_logit_softcapping": None, "head_dim": None,
    }  # fmt: skip
    attention = {
        "attn_type": "multihead_attention", "attn_pdrop": 0.0, "attn_impl": "flash", "qk_ln": False, "qk_gn": False,
        "fused_qkv": True, "clip_qkv": None, "softmax_scale": None, "attn_uses_sequence_id": False,
        "sliding_window_size": -1, "attn_logit_softcapping": None, "alibi": False, "alibi_bias_max": 8, "rope": False,
        "nope": False, "rope_theta": 10000, "rope_impl": "dail", "kv_dim": None,
        "rope_dail_config": {"type": "original", "pos_idx_in_fp32": True, "xpos_scale_base": 512},
        "rope_hf_config": {"type": "no_scaling", "factor": 1.0},
        "attn_temperature_tuning": {"floor_scale": 8192, "attn_scale": 0.0},
    }  # fmt: skip
    first = {
        "name": "kaiming_normal_", "fan_mode": "fan_in", "init_nonlinearity": "relu", "init_div_is_residual": True,
        "emb_init_std": None, "emb_init_uniform_lim": None, "init_std": None, "init_gain": 0.0,
    }  # fmt: skip
    own = {key: value for key, value in model.items() if key != "name"}
    attn = own.pop("attn_config", {})
    assert isinstance(attn, dict)
    made: dict[str, object] = {**defaults, "attn_config": {**attention, **attn}, "init_config": first}
    return {**made, "ffn_config": {"ffn_type": "mptmlp"}, "attention_bias": not own.get("no_bias", False), **own}
