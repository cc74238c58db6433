"""Folders that LLM Foundry's own code writes: raw config.json, tensors under its names.

Its layout is written out here a second time, with torch alone, so that the family's map has something to be wrong
against.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmfoundry.config import ConfigError, check, dump
from llmfoundry.hf import from_pretrained, save_pretrained
from llmfoundry.hf.facts import facts
from llmfoundry.hf.family import read_config
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

Settings = dict[str, object]
TOKENS = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(1))

# What MPTConfig of LLM Foundry v0.22 fills in, as its save_pretrained writes it.
THEIR_ATTENTION: Settings = {
    "attn_type": "multihead_attention", "attn_pdrop": 0.0, "attn_impl": "torch", "qk_ln": False, "qk_gn": False,
    "fused_qkv": True, "clip_qkv": None, "softmax_scale": None, "attn_uses_sequence_id": False,
    "sliding_window_size": -1, "attn_logit_softcapping": None, "alibi": False, "alibi_bias_max": 8, "rope": False,
    "nope": False, "rope_theta": 10000, "rope_impl": "dail",
    "rope_dail_config": {"type": "original", "pos_idx_in_fp32": True, "xpos_scale_base": 512},
    "rope_hf_config": {"type": "no_scaling", "factor": 1.0},
    "attn_temperature_tuning": {"floor_scale": 8192, "attn_scale": 0.0}, "kv_dim": None,
}  # fmt: skip
THEIRS: Settings = {
    "architectures": ["MPTForCausalLM"], "model_type": "mpt", "torch_dtype": "float32",
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig", "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
    "d_model": 32, "n_heads": 4, "n_layers": 2, "head_dim": None, "vocab_size": 97, "max_seq_len": 64,
    "expansion_ratio": 4, "emb_pdrop": 0.0, "resid_pdrop": 0.0, "embedding_fraction": 1.0, "learned_pos_emb": True,
    "fc_type": {"name": "torch"}, "init_device": "cpu", "logit_scale": None, "no_bias": False, "attention_bias": True,
    "norm_type": "low_precision_layernorm", "norm_eps": 1e-05, "use_cache": False, "use_pad_tok_in_ffn": True,
    "block_overrides": None, "final_logit_softcapping": None, "transformers_version": "4.51.3",
    "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in", "init_nonlinearity": "relu",
                    "init_div_is_residual": True, "emb_init_std": None, "emb_init_uniform_lim": None,
                    "init_std": None, "init_gain": 0.0, "verbose": 0},
}  # fmt: skip
MB: Settings = {"moe_num_experts": 4, "moe_top_k": 2, "moe_world_size": 1, "moe_loss_weight": 0.05}
TORCH_MOE: Settings = {"moe_num_experts": 4, "moe_top_k": 2, "mlp_type": "glu", "moe_jitter_eps": None,
                       "moe_normalize_expert_weights": 1, "uniform_expert_assignment": False}  # fmt: skip
GQA: Settings = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
LLAMA3: Settings = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16}  # fmt: skip

# About: their settings at the top, in attn_config and in ffn_config; then ours, in which our model is made.
CASES: dict[str, tuple[Settings, Settings, Settings, Settings]] = {
    "learned positions, biases": ({}, {}, {"ffn_type": "mptmlp"}, {"learned_pos_emb": True}),
    "grouped, learned, untied, rms": (
        {"no_bias": True, "attention_bias": False, "norm_type": "rmsnorm", "norm_eps": 1e-6,
         "tie_word_embeddings": False},
        GQA, {"ffn_type": "mptmlp", "ffn_act_fn": {"name": "gelu", "approximate": "tanh"}},
        {"no_bias": True, "norm_type": "rmsnorm", "norm_eps": 1e-6, "tie_word_embeddings": False, "attn_config": GQA,
         "ffn_config": {"ffn_type": "mptmlp", "ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}},
    ),
    "rope, one key head, gated, biases": (
        {"expansion_ratio": 1.5},
        {"attn_type": "multiquery_attention", "rope": True, "rope_theta": 500, "clip_qkv": 0.7, "softmax_scale": 0.2},
        {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 40},
        {"attn_config": {"attn_type": "multiquery_attention", "rope": True, "rope_theta": 500.0, "clip_qkv": 0.7,
                         "softmax_scale": 0.2},
         "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 40}},
    ),
    "llama3 rope, norms over all heads, three matrices, window": (
        {"no_bias": True, "attention_bias": True},
        GQA | {"rope": True, "rope_impl": "hf", "rope_hf_config": LLAMA3, "qk_ln": True, "fused_qkv": False,
               "sliding_window_size": 5},
        {"ffn_type": "mptmlp"},
        {"no_bias": True,
         "attn_config": GQA | {"rope": True, "rope_scaling": LLAMA3, "qk_ln": True, "bias": True,
                               "sliding_window_size": 5}},
    ),
    "alibi, norms of each head, soft caps": (
        {"final_logit_softcapping": 20.0},
        {"alibi": True, "alibi_bias_max": 4, "qk_gn": True, "attn_logit_softcapping": 15.0}, {},
        {"final_logit_softcapping": 20.0,
         "attn_config": {"alibi": True, "alibi_bias_max": 4, "qk_norm": True, "attn_logit_softcapping": 15.0}},
    ),
    "MegaBlocks' defaults: two matrices, one output bias": (
        {}, {}, MB | {"ffn_type": "mb_dmoe", "moe_jitter_eps": 0.0, "memory_optimized_mlp": True, "fp16": False},
        {"learned_pos_emb": True,
         "ffn_config": {"ffn_type": "moe", "mlp_type": "mlp", "ffn_act_fn": {"name": "gelu", "approximate": "tanh"},
                        "moe_bias": "output", "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    "MegaBlocks, gated, no biases, shared expert, grouped, rope": (
        {"no_bias": True, "attention_bias": False}, GQA | {"rope": True},
        MB | {"ffn_type": "mb_dmoe", "mlp_type": "glu", "ffn_hidden_size": 24, "moe_normalize_expert_weights": 1,
              "ffn_act_fn": {"name": "silu"}, "shared_expert": True, "shared_expert_hidden_size": 20},
        {"no_bias": True, "attn_config": GQA | {"rope": True},
         "ffn_config": {"ffn_type": "moe", "mlp_type": "glu", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"},
                        "moe_num_experts": 4, "moe_top_k": 2, "moe_normalize_expert_weights": 1.0,
                        "shared_expert": True, "shared_expert_hidden_size": 20}},
    ),
    "LLM Foundry's own mixture: gated, no bias in it, gelu as written": (
        {}, {"alibi": True}, TORCH_MOE | {"ffn_type": "torch_dmoe"},
        {"attn_config": {"alibi": True},
         "ffn_config": {"ffn_type": "moe", "mlp_type": "glu", "ffn_act_fn": {"name": "gelu"}, "bias": False,
                        "moe_num_experts": 4, "moe_top_k": 2, "moe_normalize_expert_weights": 1.0}},
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("about", CASES)
# What is read, and has no words or another layout when it is written.
READ_ONLY: dict[str, tuple[Settings, Settings, Settings, Settings]] = {
    "norms and attention in one module, gated experts": (
        {"fuse_norm_attn_norm": True}, {"alibi": True}, TORCH_MOE | {"ffn_type": "torch_dmoe"},
        CASES["LLM Foundry's own mixture: gated, no bias in it, gelu as written"][3],
    ),
    "norms and attention in one module, three matrices": (
        {"fuse_norm_attn_norm": True}, GQA | {"rope": True, "fused_qkv": False}, {},
        {"attn_config": GQA | {"rope": True}},
    ),
    "layers that reuse keys, have windows and no positions": (
        {"block_overrides": {"order": [{"name": "default"}, {"name": "reuse"}], "overrides": {
            "reuse": {"attn_config": {"reuse_kv_layer_idx": -1, "sliding_window_size": 4, "nope": True}}}}},
        {"rope": True}, {},
        {"attn_config": {"rope": True}, "attn_reuse_kv_pattern": [0, -1], "attn_window_pattern": [-1, 4],
         "attn_position_pattern": [True, False]},
    ),
    "heads of another size, logits scaled, norms of heads beside rmsnorm": (
        {"head_dim": 16, "logit_scale": "inv_sqrt_d_model", "norm_type": "rmsnorm", "norm_eps": 1e-6},
        {"qk_gn": True}, {},
        {"logit_scale": "inv_sqrt_d_model", "norm_type": "rmsnorm", "norm_eps": 1e-6, "learned_pos_emb": True,
         "attn_config": {"head_dim": 16, "softmax_scale": 8**-0.5, "qk_norm": True, "norm_type": "layernorm",
                         "norm_eps": 1e-5}},
    ),
    "MegaBlocks' MoE, gated: tokens dropped, matrices apart": (
        {"no_bias": True, "attention_bias": False}, {"rope": True},
        MB | {"ffn_type": "mb_moe", "mlp_type": "glu", "moe_capacity_factor": 1.25},
        {"no_bias": True, "attn_config": {"rope": True},
         "ffn_config": {"ffn_type": "moe", "moe_num_experts": 4, "moe_top_k": 2, "moe_capacity_factor": 1.25,
                        "ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}},
    ),
}  # fmt: skip


def our_model(about: str) -> CausalLM:
    """Our model of a case, with weights of a size that makes every part matter."""
    sizes = {key: THEIRS[key] for key in ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")}
    torch.manual_seed(3)
    model = check(CausalLMConfig, sizes | (CASES | READ_ONLY)[about][3]).build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + centre)
    return model


def their_config(about: str) -> Settings:
    top, attention, ffn, _ = (CASES | READ_ONLY)[about]
    return copy.deepcopy(THEIRS | top | {"attn_config": THEIR_ATTENTION | attention, "ffn_config": ffn})


def their_tensors(about: str, model: CausalLM) -> dict[str, Tensor]:
    """Our tensors as LLM Foundry and MegaBlocks lay them out."""
    ours, theirs = model.state_dict(), {}
    top, attention, ffn, _ = (CASES | READ_ONLY)[about]
    split, apart = attention.get("fused_qkv") is False, ffn.get("ffn_type") == "mb_moe"
    names = {"attn.wq.": "attn.Wq.",
        "attn.wqkv": "attn.Wqkv", "attn.q_norm": "attn.q_ln", "attn.k_norm": "attn.k_ln",
        "router.weight": "router.layer.weight", "output_bias": "experts.bias",
    }  # fmt: skip
    for name, value in ours.items():
        new = f"transformer.{name}" if name != "lm_head.weight" else name
        for old, other in names.items():
            new = new.replace(old, other)
        if top.get("fuse_norm_attn_norm"):
            new = re.sub(r"(blocks\.\d)\.(norm|attn)", r"\1.norm_attn_norm.\2", new)
        gated = ffn.get("ffn_type") == "mptglu" or ".shared_expert." in name
        if split and "attn.wqkv" in name:  # 4 heads of queries, 2 of keys, 2 of values, 8 dims each
            for letter, part in zip("qkv", value.split((32, 16, 16)), strict=True):
                theirs[new.replace("Wqkv", f"W{letter}")] = part
        elif "experts.w1" in name:
            halves = value.chunk(2, dim=1) if ffn.get("mlp_type") == "glu" else (value,)
            for leaf, half in zip(("w1", "v1"), halves, strict=False):
                stacked = half.transpose(1, 2) if apart else half.reshape(-1, half.shape[-1])
                theirs[new.replace("experts.w1", f"experts.mlp.{leaf}")] = stacked
        elif "experts.w2" in name:
            rows = value.transpose(1, 2)
            theirs[new.replace("experts.w2", "experts.mlp.w2")] = rows if apart else rows.reshape(-1, value.shape[1])
        elif ".w1." in name and gated:
            for leaf, half in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True):
                theirs[new.replace("w1", leaf)] = half
        else:
            theirs[new.replace(".w1.", ".up_proj.").replace(".w2.", ".down_proj.")] = value
    return {name: value.contiguous().clone() for name, value in theirs.items()}


def written(folder: Path, config: Settings, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("about", CASES | READ_ONLY)
def test_logits_of_what_they_write_are_ours_to_the_bit(about: str, tmp_path: Path) -> None:
    ours = our_model(about)
    folder = written(tmp_path / "theirs", their_config(about), their_tensors(about, ours))
    found = from_pretrained(folder).model
    with torch.no_grad():
        logits, true = found(TOKENS).logits, ours(TOKENS).logits
    assert logits is not None and true is not None and true.std() > 0.1
    assert torch.equal(logits, true)


@each_case
def test_what_is_asked_for_in_their_layout_is_what_they_write(about: str, tmp_path: Path) -> None:
    ours = our_model(about)
    save_pretrained(ours, None, tmp_path / "out", model_type="mpt_foundry")
    wrote, wanted = load_file(tmp_path / "out" / "model.safetensors"), their_tensors(about, ours)
    if CASES[about][1].get("fused_qkv") is not False:  # written in one matrix, whichever it was
        assert wrote.keys() == wanted.keys()
        assert all(torch.equal(wrote[name], wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mpt" and config["architectures"] == ["MPTForCausalLM"]
    assert facts(read_config(config)[1]) == facts(ours.config)


def test_a_published_file_reads_as_transformers_reads_it() -> None:
    """MPT-7B's: LLM Foundry's class, old keys, ALiBi although learned_pos_emb is on."""
    old: Settings = {
        "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "max_seq_len": 2048, "no_bias": True,
        "learned_pos_emb": True, "tokenizer_name": "EleutherAI/gpt-neox-20b", "verbose": 0,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
                        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
                        "prefix_lm": False, "qk_ln": False, "softmax_scale": None},
        "init_config": {"name": "kaiming_normal_", "init_std": None, "init_div_is_residual": True, "verbose": 0},
    }  # fmt: skip
    theirs, config = read_config(old | {"model_type": "mpt", "architectures": ["MPTForCausalLM"]})
    other, same = read_config({k: v for k, v in old.items() if k != "init_config"} | {"model_type": "mpt"})
    assert (theirs.model_type, other.model_type) == ("mpt_foundry", "mpt")
    assert facts(config) == facts(same)


def test_what_is_left_out_has_their_default() -> None:
    _, config = read_config({"model_type": "mpt", "architectures": ["MPTForCausalLM"]})
    assert (config.d_model, config.n_heads, config.n_layers, config.vocab_size) == (2048, 16, 24, 50368)
    assert config.has_learned_positions and config.tie_word_embeddings and not config.no_bias
    said = dump(config)
    assert said["norm_type"] == "low_precision_layernorm"


MISTAKES: dict[str, Settings] = {
    "config.json: block_overrides.overrides: must map names": {"block_overrides": {"order": []}},
    "fc_type={'name': 'te'} is not supported": {"fc_type": {"name": "te"}},
    "attn_config: prefix_lm=True is not supported": {"attn_config": {"prefix_lm": True}},
    "rope_dail_config: type='xpos' is not": {"attn_config": {"rope": True, "rope_dail_config": {"type": "xpos"}}},
    "type='dynamic' is not supported": {
        "attn_config": {"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "dynamic", "factor": 2.0}},
    },
    "attn_scale=0.1 is not supported": {"attn_config": {"attn_temperature_tuning": {"attn_scale": 0.1}}},
    "attn_config must be a mapping": {"attn_config": "flash"},
    "ffn_type='te_ln_mlp' is not supported": {"ffn_config": {"ffn_type": "te_ln_mlp"}},
    "ffn_act_fn.name": {"ffn_config": {"ffn_act_fn": {"name": "quick_gelu"}}},
    "norm_type": {"norm_type": "low_precision_groupnorm"},
    "surprise": {"surprise": 1},
}  # fmt: skip


@pytest.mark.parametrize("says", MISTAKES)
def test_a_setting_without_a_word_here_is_named(says: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(THEIRS | MISTAKES[says], "folder/config.json")
    assert says in str(error.value) and "config.json" in str(error.value)


def test_a_tensor_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    about = "learned positions, biases"
    ours = our_model(about)
    tensors = their_tensors(about, ours)
    del tensors["transformer.blocks.1.attn.Wqkv.bias"]
    with pytest.raises(ConfigError, match=r"'transformer.blocks.1.attn.Wqkv.bias' is missing"):
        from_pretrained(written(tmp_path / "few", their_config(about), tensors))
    tensors = their_tensors(about, ours) | {"transformer.blocks.0.ffn.gate_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(ConfigError, match=r"gate_proj.weight' has no place"):
        from_pretrained(written(tmp_path / "many", their_config(about), tensors))


def test_nothing_leaves_in_their_layout_unasked(tmp_path: Path) -> None:
    ours = our_model("rope, one key head, gated, biases")
    save_pretrained(ours, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llmfoundry"
