import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llmfoundry.config import ConfigError, check
from llmfoundry.layers.rope import NoScaling, RopeScaling, rope_table, rotate

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
SCALINGS = [
    {"type": "linear", "factor": 4.0},
    {"type": "llama3", "factor": 8.0, **LLAMA3},
    {"type": "llama3", "factor": 32.0, **LLAMA3 | {"original_max_position_embeddings": 8192}},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    {
        "type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.5,
        "beta_fast": 8.0,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s['type']}-{s['factor']}")
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_are_the_bits_of_transformers(scaling: dict[str, object], theta: float) -> None:
    rest = {key: value for key, value in scaling.items() if key != "type"}
    theirs = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=8192,
        rope_parameters={"rope_type": scaling["type"], "rope_theta": theta, **rest},
    )  # fmt: skip
    inv_freq, magnitude = ROPE_INIT_FUNCTIONS[str(scaling["type"])](theirs, torch.device("cpu"))
    ours = check(RopeScaling, dict(scaling))
    assert torch.equal(ours.inv_freq(theta, 64, torch.device("cpu")), inv_freq)
    assert ours.magnitude == magnitude


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_equals_transformers(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 9, 4, 32, dtype=dtype), torch.randn(2, 9, 2, 32, dtype=dtype)
    rope = rope_table(NoScaling(), 10000.0, 32, torch.arange(9))
    cos, sin = (torch.cat((table, table), dim=-1).squeeze(1)[None].to(dtype) for table in rope)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for ours, theirs in zip((rotate(q, rope), rotate(k, rope)), expected, strict=True):
        torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        tables = [rope_table(NoScaling(), 10000.0, 16, torch.tensor([at])) for at in (i, j)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    # Angles are float32: at position 1003 they are right to 6e-5.
    torch.testing.assert_close(score(7, 3), score(1007, 1003), rtol=0, atol=1e-3)


def test_bf16_input_is_rotated_in_float32() -> None:
    x = torch.randn(1, 64, 2, 32).bfloat16()
    rope = rope_table(NoScaling(), 10000.0, 32, torch.arange(64))
    assert torch.equal(rotate(x, rope), rotate(x.float(), rope).bfloat16())


def test_unknown_scaling_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama3'"):
        check(RopeScaling, {"type": "lama3", "factor": 8.0})
