import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmfoundry.layers.norm import LayerNorm, NormConfig, RMSNorm


def test_rmsnorm_equals_transformers() -> None:
    x, ours, theirs = torch.randn(3, 5, 48), RMSNorm(48, 1e-6), LlamaRMSNorm(48, 1e-6)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.normal_())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", [RMSNorm(512), LayerNorm(512)], ids=["rms", "layer"])
def test_bf16_input_is_rounded_once(norm: RMSNorm | LayerNorm) -> None:
    x = (torch.randn(16, 512) * 30 + 100).bfloat16()
    exact = norm.double()(x.double())
    # Half a unit in the last of bf16's 8 bits; bf16 statistics miss by ten times that here.
    torch.testing.assert_close(norm.bfloat16()(x).double(), exact, rtol=2**-8, atol=2**-8 * 0.01)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm", "low_precision_rmsnorm", "low_precision_layernorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_counts_as_built(norm_type: str, bias: bool) -> None:
    config = NormConfig.model_validate({"norm_type": norm_type, "bias": bias})
    assert config.n_params(24) == sum(p.numel() for p in config.build(24).parameters())
