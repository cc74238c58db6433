"""What LLM Foundry's MPT can do beyond the MPT of `transformers`, against its formulas written out."""

import pytest
import torch
import torch.nn.functional as F

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.family import write_config
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.parallel.recompute import recompute_blocks

SMALL = {"d_model": 48, "n_heads": 4, "n_layers": 3, "vocab_size": 101, "max_seq_len": 32}


def _model(**keys: object) -> CausalLM:
    model = check(ModelConfig, SMALL | keys).build().double()
    init_weights(model, 0)
    return model


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("scale", "factor"), [(0.3, 0.3), ("inv_sqrt_d_model", 48**-0.5), (2, 2.0)])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_scaled_before_they_are_capped(scale: object, factor: float, tied: bool) -> None:
    keys = {"tie_word_embeddings": tied}
    plain, scaled = _model(**keys), _model(**keys, logit_scale=scale, final_logit_softcapping=1.5)
    tokens = _tokens(2, 12)
    expected = 1.5 * torch.tanh(factor * plain(tokens).logits / 1.5)
    torch.testing.assert_close(scaled(tokens).logits, expected, rtol=1e-12, atol=1e-12)
    loss = F.cross_entropy(expected.flatten(0, 1), tokens.flatten(), reduction="sum")
    for by_token in (False, True):
        torch.testing.assert_close(scaled(tokens, tokens, by_token=by_token).loss_sum, loss, rtol=1e-12, atol=0)


def test_a_fraction_of_the_gradient_reaches_embeddings() -> None:
    whole, part, tokens = _model(), _model(embedding_fraction=0.1), _tokens(2, 12)
    for model in (whole, part):
        model(tokens, tokens).loss_sum.backward()
    assert torch.equal(whole(tokens).logits, part(tokens).logits)
    torch.testing.assert_close(part.wpe.weight.grad, 0.1 * whole.wpe.weight.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(part.blocks[0].attn.wqkv.weight.grad, whole.blocks[0].attn.wqkv.weight.grad)


@pytest.mark.parametrize("keys", [{"logit_scale": 0.5}, {"logit_scale": "inv_sqrt_d_model"}], ids=str)
def test_no_family_exports_what_it_cannot_say(keys: dict[str, object]) -> None:
    base = {"no_bias": True, "attn_config": {"alibi": True}}
    config = check(ModelConfig, SMALL | base | keys)
    assert isinstance(config, CausalLMConfig)
    with pytest.raises(ConfigError, match=f"lacks .*{next(iter(keys))}"):
        write_config(config)


@pytest.mark.parametrize(
    "keys", [{"logit_scale": 0.0}, {"logit_scale": "sqrt"}, {"embedding_fraction": 0.0}, {"embedding_fraction": 1.1}]
)
def test_values_without_meaning_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        check(ModelConfig, SMALL | keys)


def _reference(model: CausalLM, tokens: torch.Tensor, p: float) -> torch.Tensor:
    """LLM Foundry's forward with every dropout, in its order: embeddings, then of each layer weights, both outputs."""
    config = model.config
    heads = config.n_heads
    x = F.dropout(model.wte(tokens) + model.wpe(torch.arange(tokens.shape[1])), p)
    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    for block in model.blocks:
        q, k, v = block.attn.wqkv(block.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        y = F.dropout(scores.softmax(-1), p) @ v
        x = x + F.dropout(block.attn.out_proj(y.transpose(1, 2).flatten(2)), p)
        x = x + F.dropout(block.ffn.w2(F.gelu(block.ffn.w1(block.norm_2(x)))), p)
    return F.linear(model.norm_f(x), model.wte.weight)


@pytest.mark.parametrize("softcap", [None, 1e9])  # a cap so high that it changes nothing takes the plain path
def test_dropout_is_where_llm_foundry_has_it(softcap: float | None) -> None:
    attention = {"attn_pdrop": 0.3, "attn_logit_softcapping": softcap}
    model = _model(resid_pdrop=0.3, emb_pdrop=0.3, attn_config=attention)
    tokens = _tokens(2, 12)
    torch.manual_seed(5)
    dropped = model(tokens).logits
    torch.manual_seed(5)
    torch.testing.assert_close(dropped, _reference(model, tokens, 0.3), rtol=1e-9, atol=1e-9)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(model(tokens).logits, _reference(model, tokens, 0.0), rtol=1e-9, atol=1e-9)


DROPS = {"resid_pdrop": 0.2, "emb_pdrop": 0.1}


@pytest.mark.parametrize("attention", [{}, {"alibi": True}, {"attn_logit_softcapping": 5.0}], ids=str)
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("routed", [False, True], ids=["dense", "experts"])
def test_what_is_computed_again_drops_the_same(attention: dict[str, object], mode: str, routed: bool) -> None:
    ffn = {"ffn_type": "moe", "moe_num_experts": 4, "moe_top_k": 2} if routed else {}
    keys = DROPS | {"attn_config": attention | {"attn_pdrop": 0.2}, "ffn_config": ffn}
    tokens, found = _tokens(2, 12), []
    for how in ("none", mode):
        model = _model(**keys)
        recompute_blocks(model.blocks, how, None, in_graph=False)
        torch.manual_seed(3)
        model(tokens, tokens).loss_sum.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_the_norm_of_heads_may_be_another_than_the_models() -> None:
    keys = {"norm_type": "rmsnorm", "norm_eps": 1e-6, "no_bias": True}
    own = {"norm_type": "low_precision_layernorm", "norm_eps": 1e-5}
    model = _model(**keys, attn_config={"qk_ln": True} | own)
    attention = model.blocks[0].attn
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(attention.q_norm(x), F.layer_norm(x, (48,), eps=1e-5), rtol=1e-12, atol=1e-12)
    assert isinstance(model.norm_f, torch.nn.Module) and model.norm_f.eps == 1e-6
    assert model.config.n_params() == sum(p.numel() for p in model.parameters())
    with pytest.raises(ConfigError, match="norm_type and norm_eps are of qk_norm or qk_ln"):
        check(ModelConfig, SMALL | {"attn_config": own})
    with pytest.raises(ConfigError, match="lacks .*norm_type"):
        write_config(check(ModelConfig, SMALL | keys | {"attn_config": {"rope": True, "qk_ln": True} | own}))
