"""Adapters in peft's files: what is written makes the `transformers` model compute what ours does."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from llmfoundry.config import check
from llmfoundry.layers.lora import adapters, is_adapter
from llmfoundry.model.adapters import Names, PeftPart, load_peft, save_peft
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "initializer_range": 0.2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
OURS = {
    "vocab_size": 61, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "no_bias": True,
    "norm_type": "rmsnorm", "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True}
SILU = {"ffn_act_fn": {"name": "silu"}}
LORA = {"rank": 3, "alpha": 6.0}


def _llama() -> tuple[PreTrainedModel, dict[str, object]]:
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24))
    return theirs, {"attn_config": ATTENTION, "ffn_config": SILU | {"ffn_type": "mptglu", "ffn_hidden_size": 24}}


def _mixtral() -> tuple[PreTrainedModel, dict[str, object]]:
    theirs = MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4))
    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "moe_normalize_expert_weights": 1.0}
    return theirs, {"attn_config": ATTENTION | {"rope_theta": _theta(theirs)}, "ffn_config": _moe(ffn)}


def _qwen2_moe() -> tuple[PreTrainedModel, dict[str, object]]:
    theirs = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        **SIZES, intermediate_size=40, moe_intermediate_size=24, shared_expert_intermediate_size=20, num_experts=4,
        num_experts_per_tok=2, mlp_only_layers=[0], norm_topk_prob=False,
    ))  # fmt: skip
    ffn = {
        "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "first_k_dense": 1, "dense_ffn_hidden_size": 40,
        "shared_expert": True, "shared_expert_hidden_size": 20, "shared_expert_gate": True,
    }  # fmt: skip
    attention = ATTENTION | {"bias": True, "rope_theta": _theta(theirs)}
    return theirs, {"attn_config": attention, "ffn_config": _moe(ffn)}


def _deepseek_v2() -> tuple[PreTrainedModel, dict[str, object]]:
    latent = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(
        **SIZES | latent | {"num_key_value_heads": 4}, intermediate_size=40, moe_intermediate_size=24,
        n_shared_experts=2, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
    ))  # fmt: skip
    ffn = {
        "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "first_k_dense": 1, "dense_ffn_hidden_size": 40,
        "shared_expert": True, "shared_expert_hidden_size": 48,
    }  # fmt: skip
    attention = {"attn_type": "multihead_latent_attention", "rope_theta": _theta(theirs)} | latent
    return theirs, {"attn_config": attention, "ffn_config": _moe(ffn)}


def _theta(theirs: PreTrainedModel) -> float:
    return float(theirs.config.rope_parameters["rope_theta"])


def _moe(ffn: dict[str, object]) -> dict[str, object]:
    return SILU | {"ffn_type": "moe"} | ffn


FAMILIES = {"llama": _llama, "mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "deepseek_v2": _deepseek_v2}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
TARGETS: list[object] = ["all-linear", ["out_proj", "w2"], ["w1"]]


def _names(name: str, sizes: PreTrainedConfig) -> Sequence[PeftPart]:
    """Our weights' names in those families."""
    _, layer, room, *rest = name.split(".")
    start, leaf = f"model.layers.{layer}.", ".".join(rest)
    if leaf == "wqkv":
        rows = {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
        return [PeftPart(f"{start}self_attn.{which}_proj", at) for which, at in rows.items()]
    if room == "attn":
        attention = {
            "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj", "wkv_a": "kv_a_proj_with_mqa",
            "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "out_proj": "o_proj",
        }  # fmt: skip
        return [PeftPart(f"{start}self_attn.{attention[leaf]}")]
    shared, hidden = "shared_expert", sizes.intermediate_size
    if sizes.model_type == "deepseek_v2":
        shared = "shared_experts"
    whole = {
        "w2": "down_proj", "experts.w1": "experts.gate_up_proj", "experts.w2": "experts.down_proj",
        "shared_expert.w2": f"{shared}.down_proj", "shared_expert_gate": "shared_expert_gate",
    }  # fmt: skip
    if leaf in whole:
        return [PeftPart(f"{start}mlp.{whole[leaf]}")]
    inner = ""
    if leaf == "shared_expert.w1":
        inner, hidden = f"{shared}.", 48 if sizes.model_type == "deepseek_v2" else 20
    both = {"gate": slice(0, hidden), "up": slice(hidden, 2 * hidden)}
    return [PeftPart(f"{start}mlp.{inner}{which}_proj", at) for which, at in both.items()]


def _names_of(theirs: PreTrainedModel) -> Names:
    return partial(_names, sizes=theirs.config)


def _base_weights(ours: CausalLM, theirs: PreTrainedModel) -> dict[str, Tensor]:
    state, names = theirs.state_dict(), _names_of(theirs)
    found = {"wte.weight": state["model.embed_tokens.weight"], "norm_f.weight": state["model.norm.weight"]}
    found["lm_head.weight"] = state["lm_head.weight"]
    for name in ours.state_dict():
        if name in found or is_adapter(name):
            continue
        if ".norm_" in name:
            which = "input" if "norm_1" in name else "post_attention"
            found[name] = state[f"model.layers.{name.split('.')[1]}.{which}_layernorm.weight"]
        elif name.endswith("router.weight"):
            found[name] = state[f"model.layers.{name.split('.')[1]}.mlp.gate.weight"]
        elif ".experts." in name:
            found[name] = state[names(name)[0].name]
        else:
            weight, leaf = name.rsplit(".", 1)
            found[name] = torch.cat([state[f"{part.name}.{leaf}"] for part in names(weight)])
    return found


def _pair(family: object, targets: object = "all-linear", **lora: object) -> tuple[PreTrainedModel, CausalLM]:
    """Their model and ours with the same base weights; ours has adapters that do something."""
    torch.manual_seed(0)
    theirs, keys = family()  # type: ignore[operator]
    config = check(CausalLMConfig, OURS | keys | {"lora": LORA | {"target_modules": targets} | lora})
    ours = config.build()
    init_weights(ours, 3)
    ours.load_state_dict(_base_weights(ours, theirs), strict=False)
    with torch.no_grad():
        for adapter in adapters(ours):
            adapter.b.normal_(std=0.2)
    return theirs.eval(), ours.eval()


def _deltas(folder: Path, theirs: PreTrainedModel) -> dict[str, Tensor]:
    """What peft adds to each weight of `theirs`, by its own formulas (`ParamWrapper.get_delta_weight`)."""
    settings, tensors = json.loads((folder / "adapter_config.json").read_text()), {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        assert key.startswith("base_model.model.")
        tensors[key.removeprefix("base_model.model.")] = value
    scale, found = settings["lora_alpha"] / settings["r"], {}
    stacked = [name for name in settings["target_parameters"] or () if not name.endswith(".weight")]
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        path = key.removesuffix(".lora_A.weight")
        a, b = tensors.pop(key), tensors.pop(f"{path}.lora_B.weight")
        module = theirs.get_submodule(path.removesuffix(".base_layer"))
        if isinstance(module, torch.nn.Linear):
            found[f"{path}.weight"] = scale * b @ a
            continue
        # The outermost wrapper is of the last parameter targeted, in the module's order.
        here = [name for name, _ in module.named_parameters() if f"experts.{name}" in stacked]
        name = here[0] if path.endswith(".base_layer") else here[-1]
        n_experts = getattr(module, name).shape[0]
        a, b = a.reshape(n_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, n_experts)
        found[f"{path.removesuffix('.base_layer')}.{name}"] = scale * torch.einsum("ore,eri->eoi", b, a)
    assert not tensors
    return found


@each_family
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_the_file_adds_to_their_model_what_the_adapters_add_to_ours(
    family: object, targets: object, tmp_path: Path
) -> None:
    theirs, ours = _pair(family, targets)
    tokens = torch.randint(0, 61, (2, 20))
    assert (ours(tokens).logits - theirs(tokens).logits).abs().max() > 1e-2
    save_peft(ours, tmp_path, _names_of(theirs))
    with torch.no_grad():
        for name, delta in _deltas(tmp_path, theirs).items():
            theirs.get_parameter(name).add_(delta)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@each_family
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_peft_loads_the_file(family: object, targets: object, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs, ours = _pair(family, targets)
    save_peft(ours, tmp_path, _names_of(theirs))
    tokens = torch.randint(0, 61, (2, 20))
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-4)
    trained = {name for name, _ in loaded.named_parameters() if "lora_" in name}
    assert len(trained) == len(load_file(tmp_path / "adapter_model.safetensors"))  # nothing more, nothing less


@each_family
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_round_trip_is_bit_identical(family: object, targets: object, tmp_path: Path) -> None:
    theirs, ours = _pair(family, targets)
    save_peft(ours, tmp_path, _names_of(theirs))
    _, other = _pair(family, targets)
    with torch.no_grad():
        for adapter in adapters(other):
            adapter.a.fill_(7), adapter.b.fill_(7)
    load_peft(other, tmp_path, _names_of(theirs))
    for (name, a, b), (_, their_a, their_b) in zip(adapters(ours), adapters(other), strict=True):
        assert torch.equal(a, their_a) and torch.equal(b, their_b), name


def test_parts_with_an_a_each_add_their_ranks(tmp_path: Path) -> None:
    theirs, ours = _pair(_llama, ["wqkv"])
    save_peft(ours, tmp_path, _names_of(theirs))
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: torch.randn_like(value) for name, value in load_file(file).items()}
    tensors = {name: value for name, value in tensors.items() if ".k_proj." not in name}  # of q and v alone
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lora.rank=3 cannot hold the adapters of blocks.0.attn.wqkv; set it to 6"):
        load_peft(ours, tmp_path, _names_of(theirs))
    theirs, wide = _pair(_llama, ["wqkv"], rank=6, alpha=5.0)
    load_peft(wide, tmp_path, _names_of(theirs))
    tokens = torch.randint(0, 61, (2, 20))
    with torch.no_grad():
        for name, delta in _deltas(tmp_path, theirs).items():
            theirs.get_parameter(name).add_(delta)
    torch.testing.assert_close(wide(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_held_is_named(tmp_path: Path) -> None:
    theirs, ours = _pair(_llama)
    save_peft(ours, tmp_path, _names_of(theirs), base_model="some/model")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/model" and settings["lora_alpha"] == 6
    _, attention_only = _pair(_llama, ["wqkv", "out_proj"])
    with pytest.raises(ValueError, match="mlp.down_proj.lora_A.weight has no adapter here"):
        load_peft(attention_only, tmp_path, _names_of(theirs))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora is not supported"):
        load_peft(ours, tmp_path, _names_of(theirs))
