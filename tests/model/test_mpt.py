"""MPT whole, against `transformers`: ALiBi, clipped queries, keys and values, the cache."""

import pytest
import torch
import torch.nn.functional as F
from transformers import MptConfig, MptForCausalLM

from llmfoundry.config import ConfigError, check
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import Cache, CausalLM, CausalLMConfig

# Slopes of 4 and 6 heads are powers of two, exact in float32; those of 12 are not, and what they are multiplied by
# differs (the distance from the query here, from the last key there), so float64 agrees to float32's last bits only.
CASES = {
    "4 heads": ({"n_heads": 4}, {}, 1e-10),
    "4 heads, clipped": ({"n_heads": 4}, {"clip_qkv": 0.8}, 1e-10),
    "6 heads, scale": ({"n_heads": 6}, {"softmax_scale": 0.3}, 1e-10),
    "12 heads, clipped": ({"n_heads": 12}, {"clip_qkv": 1.0}, 1e-5),
}
each_case = pytest.mark.parametrize(("sizes", "attention", "tolerance"), CASES.values(), ids=CASES.keys())


def _pair(sizes: dict[str, int], attention: dict[str, float]) -> tuple[MptForCausalLM, CausalLM]:
    torch.manual_seed(0)
    sizes = {"d_model": 48, "n_layers": 2, "vocab_size": 101, "max_seq_len": 64} | sizes
    theirs = MptForCausalLM(MptConfig(**sizes, attn_config=attention, initializer_range=0.2)).eval()
    keys = {"no_bias": True, "attn_config": {"alibi": True} | attention}
    ours = check(ModelConfig, sizes | keys).build().eval()
    names = {"ffn.w1": "ffn.up_proj", "ffn.w2": "ffn.down_proj", "attn.wqkv": "attn.Wqkv"}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        state = {name.removeprefix("transformer."): value for name, value in theirs.state_dict().items()}
        for name, parameter in ours.named_parameters():
            for our, their in names.items():
                name = name.replace(our, their)
            parameter.copy_(state[name])
    return theirs, ours


@each_case
def test_logits_and_loss_equal_transformers(
    sizes: dict[str, int], attention: dict[str, float], tolerance: float
) -> None:
    theirs, ours = _pair(sizes, attention)
    tokens = torch.randint(0, 101, (2, 40))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    theirs, ours = theirs.double(), ours.double()
    logits, expected = ours(tokens).logits, theirs(tokens).logits
    # Their softmax is float32 whatever the model's dtype: which by itself costs 1e-7 per layer.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=tolerance, atol=tolerance)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    torch.testing.assert_close(ours(tokens, labels).loss_sum, loss, rtol=1e-6, atol=0)


@each_case
def test_greedy_generation_with_the_cache_equals_transformers(
    sizes: dict[str, int], attention: dict[str, float], tolerance: float
) -> None:
    theirs, ours = _pair(sizes, attention)
    prompt = torch.randint(0, 101, (3, 7))
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    cache, fresh, found = Cache(2, capacity=8), prompt, prompt
    with torch.no_grad():
        for _ in range(30):
            fresh = ours(fresh, cache=cache, last_only=True).logits.argmax(-1)
            found = torch.cat((found, fresh), dim=1)
    assert torch.equal(found, expected)


def test_alibi_learns_no_positions_and_costs_no_flops() -> None:
    sizes = {"d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 101, "max_seq_len": 64}
    alibi, learned = (check(CausalLMConfig, sizes | {"attn_config": {"alibi": on}}) for on in (True, False))
    assert not alibi.has_learned_positions and alibi.build().wpe is None
    assert learned.n_params() - alibi.n_params() == 64 * 48
    assert alibi.flops_per_token() == learned.flops_per_token()
    with pytest.raises(ConfigError, match="learned_pos_emb and attn_config.alibi are both on"):
        check(ModelConfig, sizes | {"learned_pos_emb": True, "attn_config": {"alibi": True}})
