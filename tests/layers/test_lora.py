import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfoundry.config import ConfigError, check
from llmfoundry.layers.lora import LoRAConfig, LoRALinear, adapted, adapters, effective_weight, is_adapter
from llmfoundry.model.adapters import folded
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import Cache, CausalLM, CausalLMConfig
from llmfoundry.parallel.recompute import recompute_blocks

SIZES = {
    "d_model": 16, "n_heads": 4, "n_layers": 3, "vocab_size": 61, "max_seq_len": 24, "norm_type": "rmsnorm",
    "init_config": {"name": "normal_", "init_std": 0.2},
}  # fmt: skip
GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True}
LATENT = {
    "attn_type": "multihead_latent_attention", "q_lora_rank": 6, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 6,
}  # fmt: skip
MOE = {
    "ffn_type": "moe", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}, "moe_num_experts": 4,
    "moe_top_k": 2, "moe_normalize_expert_weights": 1.0, "first_k_dense": 1, "shared_expert": True,
    "shared_expert_gate": True,
}  # fmt: skip
LORA = {"rank": 3, "alpha": 6.0}
CASES = {
    "dense": {"attn_config": GROUPED},
    "mixture": {"attn_config": GROUPED, "ffn_config": MOE},
    "latent attention": {"attn_config": LATENT, "ffn_config": MOE, "no_bias": True, "tie_word_embeddings": False},
    "attention only": {"attn_config": GROUPED, "ffn_config": MOE, "lora": LORA | {"target_modules": ["wqkv"]}},
    "experts only": {"attn_config": GROUPED, "ffn_config": MOE, "lora": LORA | {"target_modules": ["experts.w2"]}},
}  # fmt: skip
each_case = pytest.mark.parametrize("keys", CASES.values(), ids=CASES.keys())


def _config(keys: dict[str, object]) -> CausalLMConfig:
    return check(CausalLMConfig, SIZES | {"lora": LORA} | keys)


def _model(config: CausalLMConfig, dtype: torch.dtype = torch.float64) -> CausalLM:
    with torch.device("meta"):
        model = config.build()
    model = model.to(dtype).to_empty(device="cpu")
    init_weights(model, 3)
    return model


def _moved(model: CausalLM) -> CausalLM:
    """The model with adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["q_proj", "k_proj", "v_proj"], {f"{i}.attn.wqkv" for i in range(3)}),
        (["down_proj"], {"0.ffn.w2", *(f"{i}.ffn.{of}.w2" for i in (1, 2) for of in ("experts", "shared_expert"))}),
        (["experts.w1"], {"1.ffn.experts.w1", "2.ffn.experts.w1"}),
        (r"blocks\.[01]\.attn\..*", {f"{i}.attn.{leaf}" for i in range(2) for leaf in ("wqkv", "out_proj")}),
        (r".*\.experts\..*", {f"{i}.ffn.experts.{leaf}" for i in (1, 2) for leaf in ("w1", "w2")}),
    ],
    ids=["their names", "one of their names", "end of our name", "pattern", "pattern of experts"],
)
def test_targets_by_ends_by_their_names_and_by_pattern(targets: object, names: set[str]) -> None:
    config = _config(CASES["mixture"] | {"lora": LORA | {"target_modules": targets}})
    assert {adapter.name for adapter in adapters(_model(config))} == {f"blocks.{name}" for name in names}


def test_the_names_of_peft_and_its_scales() -> None:
    theirs = check(LoRAConfig, {"r": 16, "lora_alpha": 8.0, "lora_dropout": 0.25})
    assert theirs == check(LoRAConfig, {"rank": 16, "alpha": 8.0, "dropout": 0.25}) and theirs.scale == 0.5
    assert check(LoRAConfig, {"r": 16, "lora_alpha": 8.0, "use_rslora": True}).scale == 2.0


@pytest.mark.parametrize("bias", [False, True])
def test_in_bf16_a_small_adapter_of_a_linear_layer_acts_as_much_as_it_should(bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(256, 64, bias=bias)
    layer = LoRALinear(linear, check(LoRAConfig, {"rank": 8, "alpha": 8.0}))
    with torch.no_grad():
        layer.lora_A.normal_(), layer.lora_B.normal_()
        layer.lora_B.mul_(1e-3 * linear.weight.std() / (layer.lora_B @ layer.lora_A).std())
    layer, x = layer.bfloat16(), torch.randn(2, 4096, 256).bfloat16().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    exact = x.double() @ (layer.lora_B.double() @ layer.lora_A.double()).T
    found = y.double() - F.linear(x, layer.weight, layer.bias).double()
    assert abs(float((found * exact).sum() / exact.square().sum()) - 1) < 0.1, "0.5 is left of it after two roundings"
    through = layer.weight.double().sum(0) + (layer.lora_B.double() @ layer.lora_A.double()).sum(0)
    torch.testing.assert_close(x.grad[0, 0].double(), through, rtol=0.02, atol=0.02)
    assert layer.weight.grad is None and layer.lora_A.grad is not None


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recompute_drops_the_same(mode: str) -> None:
    config = _config(CASES["mixture"] | {"lora": LORA | {"dropout": 0.3}})
    tokens, gradients = torch.randint(0, 61, (2, 12)), []
    for recompute in ("none", mode):
        model = _model(config)
        with torch.no_grad():
            for _, _, b in adapters(model):
                b.fill_(0.05)
        recompute_blocks(model.blocks, recompute, None, in_graph=False)
        torch.manual_seed(5)
        model(tokens).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            quiet = model.eval()(tokens).logits
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, quiet) and not torch.equal(model.train()(tokens).logits, quiet)


@each_case
def test_step_0_is_the_base_model_bitwise(keys: dict[str, object]) -> None:
    adapted_model, tokens = _model(_config(keys)), torch.randint(0, 61, (2, 12))
    base = _model(_config(keys | {"lora": None}))
    assert torch.equal(adapted_model(tokens).logits, base(tokens).logits)
    state = adapted_model.state_dict()
    assert {name for name in state if not is_adapter(name)} == base.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())


@each_case
def test_counts_as_built(keys: dict[str, object]) -> None:
    config = _config(keys)
    model = _model(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert config.n_params() == sum(p.numel() for p in model.parameters())
    assert config.n_trainable_params() == trained > 0
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if is_adapter(name)
    }
    base = _config(keys | {"lora": None})
    assert config.n_params() - trained == base.n_params() == base.n_trainable_params()
    # Two of four experts' adapters, and all others.
    active = sum((a.numel() + b.numel()) // (2 if a.dim() == 3 else 1) for _, a, b in adapters(model))
    assert config.n_active_params() - base.n_active_params() == active
    # A frozen weight costs 4 FLOPs a token, an adapter's 6.
    looked_up = 0 if config.tie_word_embeddings else 61 * 16
    scores = base.flops_per_token() - 6 * (base.n_active_params() - looked_up)
    assert config.flops_per_token() == 4 * (base.n_active_params() - looked_up) + 6 * active + scores


def test_all_linear_is_every_linear_layer_and_the_experts() -> None:
    names = {adapter.name for adapter in adapters(_model(_config(CASES["mixture"])))}
    attention = {f"blocks.{i}.attn.{leaf}" for i in range(3) for leaf in ("wqkv", "out_proj")}
    dense = {f"blocks.0.ffn.{leaf}" for leaf in ("w1", "w2")}
    of_mixture = ("experts.w1", "experts.w2", "shared_expert.w1", "shared_expert.w2", "shared_expert_gate")
    mixture = {f"blocks.{i}.ffn.{leaf}" for i in (1, 2) for leaf in of_mixture}
    assert names == attention | dense | mixture


def test_initial_adapters_are_those_of_peft() -> None:
    wide = _config({"attn_config": GROUPED, "ffn_config": MOE, "d_model": 256, "lora": LORA | {"rank": 64}})
    for name, a, b in adapters(_model(wide, torch.float32)):
        bound = 1 / math.sqrt(a.shape[-1])  # kaiming_uniform_ with a = sqrt(5)
        assert b.abs().max() == 0, name
        assert 0.97 * bound < a.abs().max() <= bound, name
        torch.testing.assert_close(a.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.05, atol=0)


def test_linear_layer_runs_its_adapter_beside_itself() -> None:
    config = _config(CASES["dense"]).lora
    linear = nn.Linear(7, 5).double()
    layer, x = LoRALinear(linear, config), torch.randn(4, 7, dtype=torch.float64)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
    delta = config.alpha / config.rank * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(effective_weight(layer), linear.weight + delta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), linear(x) + x @ delta.T, rtol=1e-12, atol=1e-12)
    assert effective_weight(linear) is linear.weight


def test_each_expert_has_an_adapter_of_its_own() -> None:
    weight, a, b = torch.randn(3, 5, 7), torch.randn(3, 2, 7), torch.randn(3, 5, 2)
    expected = torch.stack([weight[e] + 0.5 * b[e] @ a[e] for e in range(3)])
    torch.testing.assert_close(adapted(weight, a, b, 0.5), expected)
    assert adapted(weight, None, None, 0.5) is weight


@each_case
@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_folded_weights_give_the_same_logits(keys: dict[str, object], backend: str) -> None:
    if "ffn_config" in keys:
        keys = keys | {"ffn_config": keys["ffn_config"] | {"moe_impl": backend}}
    model = _moved(_model(_config(keys)))
    base = _model(_config(keys | {"lora": None}))
    tokens = torch.randint(0, 61, (2, 12))
    before = base(tokens).logits
    base.load_state_dict(dict(folded(model)))
    torch.testing.assert_close(base(tokens).logits, model(tokens).logits, rtol=1e-11, atol=1e-11)
    assert (base(tokens).logits - before).abs().max() > 1e-2


def test_absorbed_decoding_sees_the_adapter_too() -> None:
    model, tokens, cache = _moved(_model(_config(CASES["latent attention"]))), torch.randint(0, 61, (2, 12)), Cache(3)
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in tokens.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, rtol=0, atol=1e-11)


@each_case
def test_training_changes_adapters_only_and_lowers_the_loss(keys: dict[str, object]) -> None:
    model, tokens = _model(_config(keys), torch.float32), torch.randint(0, 61, (4, 12))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses: list[Tensor] = []
    for _ in range(30):
        loss = F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != is_adapter(name), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora": LORA | {"target_modules": ["wqvk"]}}, "lora.target_modules: nothing is called 'wqvk'"),
        ({"lora": LORA | {"target_modules": ["q_proj", "v_proj"]}}, "'q_proj' is a part of wqkv; name q_proj, k_proj"),
        ({"lora": LORA | {"target_modules": "wqkv"}}, "'wqkv' matches no whole name, such as blocks.0.attn.wqkv"),
        ({"lora": LORA | {"target_modules": "(wqkv"}}, "'\\(wqkv' is not a valid pattern"),
        ({"lora": LORA | {"target_modules": []}}, "target_modules is empty"),
        ({"lora": LORA | {"dropout": 1.0}}, "lora.dropout"),
        ({"lora": LORA | {"r": 4}}, "r and rank are the same; keep one"),
        ({"ffn_config": MOE | {"moe_bias_update_rate": 0.01}}, "moe_bias_update_rate=0.01"),
    ],
)
def test_mistakes_are_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config({"attn_config": GROUPED} | keys)
