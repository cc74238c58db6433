import pytest
import torch
import torch.nn.functional as F

from llmfoundry.config import ConfigError, check
from llmfoundry.layers.ffn import FFNConfig


@pytest.mark.parametrize("ffn_type", ["mptmlp", "mlp", "mptglu", "glu"])
@pytest.mark.parametrize("bias", [True, False])
def test_counts_as_built(ffn_type: str, bias: bool) -> None:
    config = check(FFNConfig, {"ffn_type": ffn_type, "ffn_hidden_size": 24, "bias": bias})
    built = sum(p.numel() for p in config.build(16, 4, 0).parameters())
    assert config.n_params(16) == config.n_active_params(16) == built


def test_glu_is_act_gate_times_up() -> None:
    config = check(FFNConfig, {"ffn_type": "mptglu", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}})
    block, x = config.build(16, 4, 0), torch.randn(2, 3, 16)
    gate, up = (x @ block.w1.weight.T).chunk(2, dim=-1)
    y, router = block(x, None)
    torch.testing.assert_close(y, (F.silu(gate) * up) @ block.w2.weight.T)
    assert router is None


@pytest.mark.parametrize(("approximate", "exact"), [("none", "none"), ("tanh", "tanh")])
def test_mlp_has_foundrys_default_activation(approximate: str, exact: str) -> None:
    act = {"name": "gelu", "approximate": approximate} if approximate == "tanh" else None
    config = check(FFNConfig, {"ffn_hidden_size": 24} | ({"ffn_act_fn": act} if act else {}))
    block, x = config.build(16, 4, 0), torch.randn(2, 3, 16)
    h = F.gelu(x @ block.w1.weight.T, approximate=exact)
    torch.testing.assert_close(block(x).y, h @ block.w2.weight.T)


def test_model_fills_only_what_the_yaml_left_out() -> None:
    left_out = check(FFNConfig, {"ffn_type": "mptglu"}).filled(64, True)
    assert (left_out.ffn_hidden_size, left_out.bias) == (64, True)
    given = check(FFNConfig, {"ffn_type": "mptglu", "ffn_hidden_size": 24, "bias": False}).filled(64, True)
    assert (given.ffn_hidden_size, given.bias) == (24, False)


def test_gated_activation_in_a_plain_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a gated block"):
        check(FFNConfig, {"ffn_type": "mptmlp", "ffn_act_fn": {"name": "swiglu_oss"}})


def test_unknown_ffn_type_lists_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mptglu'"):
        check(FFNConfig, {"ffn_type": "mptgluu"})
