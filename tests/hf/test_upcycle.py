from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.upcycle import Upcycling, upcycle, upcycled_config
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

SIZES = {
    "d_model": 24, "n_heads": 4, "n_layers": 4, "vocab_size": 61, "max_seq_len": 32, "norm_type": "rmsnorm",
    "attn_config": {"attn_type": "multihead_attention", "rope": True},
    "init_config": {"name": "normal_", "init_std": 0.2},
}  # fmt: skip
GLU = {
    "no_bias": True, "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 48, "ffn_act_fn": {"name": "silu"}},
    "tie_word_embeddings": False,
}  # fmt: skip
MLP = {"ffn_config": {"ffn_type": "mptmlp"}}  # with biases, and the hidden size left to expansion_ratio
each_dense = pytest.mark.parametrize("keys", [GLU, MLP], ids=["gated", "biases"])
PLANS = {
    "copies": {"moe_num_experts": 4, "moe_top_k": 2},
    "copies, all of them": {"moe_num_experts": 3, "moe_top_k": 3},
    "granular": {"moe_num_experts": 8, "moe_top_k": 4, "granularity": 2},
    "granular, one copy": {"moe_num_experts": 16, "moe_top_k": 4, "granularity": 4},
    "granular, scaled weights": {"moe_num_experts": 8, "moe_top_k": 4, "granularity": 2, "scale_in": "weights"},
    "granular, G no power of two": {"moe_num_experts": 9, "moe_top_k": 6, "granularity": 3},
    "some layers": {
        "moe_num_experts": 8, "moe_top_k": 4, "granularity": 2, "first_k_dense": 1, "moe_layer_freq": 2
    },
}  # fmt: skip
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def _dense(keys: dict[str, object]) -> CausalLM:
    config = check(CausalLMConfig, SIZES | keys)
    model = config.build()
    init_weights(model, 5)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, which start as ones and zeros
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _grow(dense: CausalLM, seed: int = 17, **keys: object) -> CausalLM:
    plan = check(Upcycling, keys)
    grown = upcycled_config(dense.config, plan).build().to(dense.wte.weight.dtype)
    grown.load_state_dict(dict(upcycle(dense.state_dict().items(), dense.config, plan, seed)))
    return grown


@each_dense
@each_plan
def test_logits_equal_the_dense_models(keys: dict[str, object], plan: dict[str, object]) -> None:
    dense, tokens = _dense(keys), torch.randint(0, 61, (3, 30))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        dense = dense.to(dtype)
        grown = _grow(dense, **plan)
        torch.testing.assert_close(grown(tokens).logits, dense(tokens).logits, rtol=tolerance, atol=tolerance)
        assert grown.config.n_params() == sum(p.numel() for p in grown.parameters())


@each_dense
def test_a_token_takes_whole_copies(keys: dict[str, object]) -> None:
    grown = _grow(_dense(keys).double(), moe_num_experts=12, moe_top_k=6, granularity=3)
    x = torch.randn(2, 50, 24, dtype=torch.float64)
    for block in grown.blocks:
        routing = block.ffn.router(x)
        shards = torch.zeros(100, 12).scatter_(1, routing.experts, 1.0).view(100, 4, 3).sum(-1)
        assert set(shards.flatten().tolist()) == {0.0, 3.0}
        torch.testing.assert_close(routing.weights.sum(-1), torch.full((100,), 3.0, dtype=torch.float64))
        assert len({tuple(row) for row in block.ffn.router.weight.tolist()}) == 4


def test_the_shards_of_a_copy_part_in_training() -> None:
    grown, tokens = _grow(_dense(GLU), **PLANS["granular"]), torch.randint(0, 61, (3, 30))
    grown(tokens, tokens.roll(-1, 1)).loss_sum.backward()
    rows = grown.blocks[0].ffn.router.weight.grad
    assert (rows[0] - rows[1]).abs().max() > 1e-3 * rows.abs().max() > 0


def test_tensors_are_streamed() -> None:
    dense, taken = _dense(GLU), []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in dense.state_dict().items():
            taken.append(name)
            yield name, tensor

    plan = check(Upcycling, PLANS["copies"])
    for name, _ in upcycle(weights(), dense.config, plan, 0):
        assert taken[-1] == name or ".ffn." in name
    assert len(taken) == len(dense.state_dict())


def test_values_depend_on_seed_and_name_alone() -> None:
    dense = _dense(GLU)
    plan = check(Upcycling, PLANS["granular"] | {"noise": 0.1, "drop": 0.5})
    state = dense.state_dict()
    forth, back, other = (
        dict(upcycle(items, dense.config, plan, seed))
        for items, seed in ((state.items(), 1), (reversed(state.items()), 1), (state.items(), 2))
    )
    assert forth.keys() == back.keys()
    assert all(torch.equal(value, back[name]) for name, value in forth.items())
    for name in ("router.weight", "experts.w1", "experts.w2"):
        assert not torch.equal(forth[f"blocks.0.ffn.{name}"], other[f"blocks.0.ffn.{name}"])
        assert not torch.equal(forth[f"blocks.0.ffn.{name}"], forth[f"blocks.1.ffn.{name}"])
    assert abs(forth["blocks.0.ffn.router.weight"].std() - 0.02) < 0.005


def test_noise_is_relative_and_each_experts_own() -> None:
    dense = _dense(GLU)
    plain, noisy = (_grow(dense, **PLANS["copies"], noise=noise) for noise in (0.0, 0.2))
    for name in ("w1", "w2"):
        before, after = (getattr(model.blocks[1].ffn.experts, name) for model in (plain, noisy))
        added = after - before
        torch.testing.assert_close(added.std(), 0.2 * before.std(), rtol=0.05, atol=0)
        assert not torch.equal(added[0], added[1])


def test_dropped_units_are_the_same_in_gate_up_and_down() -> None:
    dense = _dense(GLU)
    plain, dropped = (_grow(dense, **PLANS["granular"], drop=drop) for drop in (0.0, 0.25))
    for block in range(4):
        before, after = (model.blocks[block].ffn.experts for model in (plain, dropped))
        chosen = []
        for e in range(8):
            gate, up = (after.w1[e] != before.w1[e]).any(-1).view(2, 24)
            down = (after.w2[e] != before.w2[e]).any(0)
            assert torch.equal(gate, up) and torch.equal(up, down) and down.sum() == 6
            chosen.append(tuple(down.nonzero().flatten().tolist()))
        assert len(set(chosen)) == 8
        for name in ("w1", "w2"):  # mean and deviation stay, within what 6 units tell
            old, new = getattr(before, name), getattr(after, name)
            changed = old != new
            torch.testing.assert_close(new[changed].std(), old[changed].std(), rtol=0.1, atol=0)
            torch.testing.assert_close(new[changed].mean(), old[changed].mean(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"moe_num_experts": 8, "moe_top_k": 3, "granularity": 2}, "moe_top_k=3 is not a multiple of granularity=2"),
        ({"moe_num_experts": 7, "moe_top_k": 2, "granularity": 2}, "moe_num_experts=7 is not a multiple"),
        ({"moe_num_experts": 10, "moe_top_k": 5, "granularity": 5}, "granularity=5 does not divide the hidden size 48"),
        ({"moe_num_experts": 4, "moe_top_k": 5}, "moe_top_k=5 exceeds moe_num_experts=4"),
        ({"moe_num_experts": 3, "moe_top_k": 1}, "the router no gradient and it learns nothing; write moe_top_k=2"),
    ],
)
def test_mistakes_are_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycled_config(check(CausalLMConfig, SIZES | GLU), check(Upcycling, keys))


def test_only_a_dense_model_grows() -> None:
    plan = check(Upcycling, PLANS["copies"])
    with pytest.raises(ConfigError, match="only a dense model can be upcycled"):
        upcycled_config(upcycled_config(check(CausalLMConfig, SIZES | GLU), plan), plan)
