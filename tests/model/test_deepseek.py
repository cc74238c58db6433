"""DeepSeek-V2 and V3 whole, against `transformers`: latent attention, both ways of routing, yarn, the cache."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from llmfoundry.config import check
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import Cache, CausalLM
from llmfoundry.moe.layer import MoE

SIZES = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
    "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "moe_intermediate_size": 24, "n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
ATTENTION = {
    "attn_type": "multihead_latent_attention", "rope_theta": 500.0,
    "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip
FFN = {
    "ffn_type": "moe", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}, "moe_num_experts": 16,
    "moe_top_k": 4, "first_k_dense": 1, "dense_ffn_hidden_size": 80, "shared_expert": True,
}  # fmt: skip
OURS = {
    "vocab_size": 101, "d_model": 48, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "no_bias": True,
    "norm_type": "rmsnorm", "norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.707}


def _v3(attention: dict[str, object], ffn: dict[str, object], **keys: object) -> tuple[PreTrainedModel, CausalLM]:
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | {"rope_parameters": dict(ROPE)} | keys))
    routing = {"moe_score_fn": "sigmoid", "moe_bias_update_rate": 0.0}
    return theirs, _build(attention, routing | ffn)


def _v2(attention: dict[str, object], ffn: dict[str, object], **keys: object) -> tuple[PreTrainedModel, CausalLM]:
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES | {"rope_parameters": dict(ROPE)} | keys))
    return theirs, _build(attention, ffn)


def _build(attention: dict[str, object], ffn: dict[str, object]) -> CausalLM:
    return check(ModelConfig, OURS | {"attn_config": ATTENTION | attention, "ffn_config": FFN | ffn}).build()


CASES = {
    "v3 as published": lambda: _v3(
        {"q_lora_rank": 20, "rope_scaling": {"type": "yarn", **YARN}},
        {"moe_normalize_expert_weights": 1.0, "moe_routed_scaling": 2.5, "moe_n_groups": 4, "moe_topk_groups": 2},
        q_lora_rank=20, n_group=4, topk_group=2, routed_scaling_factor=2.5, n_shared_experts=1,
        rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, **YARN},
    ),
    "v3 plain queries, biases, halves": lambda: _v3(
        {"bias": True, "out_bias": True, "rope_interleaved": False},
        {"moe_n_groups": 2, "moe_topk_groups": 1, "shared_expert_hidden_size": 48},
        q_lora_rank=None, n_group=2, topk_group=1, routed_scaling_factor=1.0, n_shared_experts=2,
        attention_bias=True, rope_interleave=False, norm_topk_prob=False,
    ),
    "v3 one group": lambda: _v3(
        {"q_lora_rank": 20, "bias": True, "out_bias": True},
        {"moe_normalize_expert_weights": 1.0, "moe_routed_scaling": 1.5, "first_k_dense": 0},
        q_lora_rank=20, n_group=1, topk_group=1, routed_scaling_factor=1.5, attention_bias=True,
        first_k_dense_replace=0,
    ),
    "v2 as published": lambda: _v2(
        {"q_lora_rank": 20, "rope_scaling": {"type": "yarn", **YARN | {"mscale": 0.707}}},
        {"moe_n_groups": 4, "moe_topk_groups": 2, "moe_routed_scaling": 16.0, "shared_expert_hidden_size": 48},
        q_lora_rank=20, n_group=4, topk_group=2, routed_scaling_factor=16.0, n_shared_experts=2,
        topk_method="group_limited_greedy",
        rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, **YARN | {"mscale": 0.707}},
    ),
    "v2 lite": lambda: _v2(
        {}, {"shared_expert_hidden_size": 48}, q_lora_rank=None, n_shared_experts=2, topk_method="greedy"
    ),
    "v2 biases": lambda: _v2(
        {"q_lora_rank": 20, "bias": True, "out_bias": True}, {"moe_routed_scaling": 2.0, "moe_layer_freq": 1},
        q_lora_rank=20, n_shared_experts=1, topk_method="greedy", routed_scaling_factor=2.0, attention_bias=True,
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def _ours_from_theirs(ours: CausalLM, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names, with their values; works on weights and on gradients."""
    found = {
        "wte.weight": state["model.embed_tokens.weight"],
        "norm_f.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }
    attention = {
        "wq": "q_proj", "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj",
        "wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "out_proj": "o_proj",
    }  # fmt: skip
    for layer, block in enumerate(ours.blocks):
        start = f"model.layers.{layer}."
        part = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        here = {"norm_1.weight": part["input_layernorm.weight"]}
        here["norm_2.weight"] = part["post_attention_layernorm.weight"]
        for our, their in attention.items():
            for leaf in ("weight", "bias"):
                if f"self_attn.{their}.{leaf}" in part:
                    here[f"attn.{our}.{leaf}"] = part[f"self_attn.{their}.{leaf}"]
        dense = ("ffn", "mlp") if not isinstance(block.ffn, MoE) else ("ffn.shared_expert", "mlp.shared_experts")
        gate, up = (part[f"{dense[1]}.{which}_proj.weight"] for which in ("gate", "up"))
        here[f"{dense[0]}.w1.weight"] = torch.cat((gate, up))
        here[f"{dense[0]}.w2.weight"] = part[f"{dense[1]}.down_proj.weight"]
        if isinstance(block.ffn, MoE):
            here["ffn.router.weight"] = part["mlp.gate.weight"]
            here["ffn.experts.w1"] = part["mlp.experts.gate_up_proj"]
            here["ffn.experts.w2"] = part["mlp.experts.down_proj"]
            if "mlp.gate.e_score_correction_bias" in part:
                here["ffn.router.expert_bias"] = part["mlp.gate.e_score_correction_bias"]
        found |= {f"blocks.{layer}.{name}": value for name, value in here.items()}
    return found


def _pair(case: object) -> tuple[PreTrainedModel, CausalLM]:
    """Both models with the same weights, all of them random."""
    torch.manual_seed(0)
    theirs, ours = case()  # type: ignore[operator]
    theirs.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *(b for n, b in theirs.named_buffers() if "correction" in n)):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    ours.load_state_dict(_ours_from_theirs(ours, theirs.state_dict()))
    return theirs.eval(), ours.eval()


def _rotate_without_rounding(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """V2's rotation, which in theirs goes through float32."""
    pairs = (torch.view_as_complex(each.reshape(*each.shape[:-1], -1, 2)) for each in (q, k))
    turned = [torch.view_as_real(each * table.unsqueeze(1)).flatten(3) for each in pairs]
    return turned[0], turned[1]


def _in_float64(theirs: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their code says float32 it shall mean float64: else its rounding would hide a difference.

    Angles stay float32, as ours are. torch.polar differs from torch.cos and torch.sin in the last bit.
    """
    exact = {"float32": torch.float64, "polar": lambda size, angle: torch.complex(angle.cos(), angle.sin()) * size}
    for module in (modeling_deepseek_v2, modeling_deepseek_v3):
        monkeypatch.setattr(module, "torch", SimpleNamespace(**vars(torch) | exact))
    monkeypatch.setattr(modeling_deepseek_v2, "apply_rotary_emb", _rotate_without_rounding)
    theirs.double()


@each_case
def test_logits_and_gradients_equal_transformers(case: object, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _pair(case)
    tokens = torch.randint(0, 101, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    _in_float64(theirs, monkeypatch)
    ours.double()
    logits, expected = ours(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for each in (logits, expected):
        F.cross_entropy(each[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = _ours_from_theirs(ours, {name: p.grad for name, p in theirs.named_parameters()})
    named = dict(ours.named_parameters())
    assert named.keys() == gradients.keys()
    for name, parameter in named.items():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-10)


@each_case
def test_routing_equals_transformers_token_by_token(case: object) -> None:
    theirs, ours = _pair(case)
    x = torch.randn(5, 50, 48)
    for layer in (1, 2):
        _, weights, experts = theirs.model.layers[layer].mlp.gate(x)
        routing = ours.blocks[layer].ffn.router(x)
        by_expert = torch.zeros(2, 250, 16)
        by_expert[0].scatter_(1, experts, weights)
        by_expert[1].scatter_(1, routing.experts, routing.weights)
        torch.testing.assert_close(by_expert[1], by_expert[0], rtol=1e-6, atol=1e-7)


@each_case
def test_attention_equals_transformers(case: object) -> None:
    theirs, ours = _pair(case)
    x = torch.randn(2, 30, 48)
    seen: dict[str, Tensor] = {}
    attention = theirs.model.layers[1].self_attn
    attention.register_forward_hook(lambda m, a, k, out: seen.update(x=k["hidden_states"], y=out[0]), with_kwargs=True)
    with torch.no_grad():
        theirs(inputs_embeds=x)
        _, rope, masks = ours._prepare(torch.zeros(2, 30, dtype=torch.int64), None, None, None)
        y = ours.blocks[1].attn(seen["x"], rope, masks[-1])
    torch.testing.assert_close(y, seen["y"], rtol=1e-5, atol=1e-5)


@each_case
def test_greedy_generation_with_the_cache_equals_transformers(case: object) -> None:
    theirs, ours = _pair(case)
    prompt = torch.randint(0, 101, (3, 7))
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    cache, fresh, found = Cache(3, capacity=8), prompt, prompt
    with torch.no_grad():
        for _ in range(30):
            fresh = ours(fresh, cache=cache, last_only=True).logits.argmax(-1)
            found = torch.cat((found, fresh), dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("theirs", "keys"),
    [
        (
            DeepseekV3Config(num_hidden_layers=4),
            {
                "d_model": 7168, "n_heads": 128, "n_layers": 4, "vocab_size": 129280,
                "attn_config": {
                    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                    "v_head_dim": 128,
                },
                "ffn_config": {
                    "ffn_hidden_size": 2048, "moe_num_experts": 256, "moe_top_k": 8, "first_k_dense": 3,
                    "dense_ffn_hidden_size": 18432,
                },
            },
        ),
        (
            DeepseekV2Config(
                num_hidden_layers=3, hidden_size=2048, num_attention_heads=16, q_lora_rank=None,
                intermediate_size=10944, moe_intermediate_size=1408, num_experts_per_tok=6, first_k_dense_replace=1,
            ),
            {
                "d_model": 2048, "n_heads": 16, "n_layers": 3, "vocab_size": 102400,
                "attn_config": {
                    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128
                },
                "ffn_config": {
                    "ffn_hidden_size": 1408, "moe_num_experts": 64, "moe_top_k": 6, "first_k_dense": 1,
                    "dense_ffn_hidden_size": 10944, "shared_expert_hidden_size": 2816,
                },
            },
        ),
    ],
    ids=["v3 in full width", "v2 lite in full width"],
)  # fmt: skip
def test_parameter_counts_equal_transformers(theirs: DeepseekV3Config, keys: dict[str, object]) -> None:
    model = DeepseekV3ForCausalLM if isinstance(theirs, DeepseekV3Config) else DeepseekV2ForCausalLM
    config = check(ModelConfig, OURS | keys | {
        "attn_config": {"attn_type": "multihead_latent_attention"} | keys["attn_config"],
        "ffn_config": {"ffn_type": "moe", "shared_expert": True} | keys["ffn_config"],
    })  # fmt: skip
    with torch.device("meta"):
        ours: nn.Module = config.build()
        assert config.n_params() == sum(p.numel() for p in model(theirs).parameters())
    assert config.n_params() == sum(p.numel() for p in ours.parameters())
