"""What LLM Foundry's MPT can do beyond the MPT of `transformers`, against its formulas written out."""

import pytest
import torch
import torch.nn.functional as F

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.family import write_config
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

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
