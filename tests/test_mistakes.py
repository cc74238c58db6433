"""Every mistake in a config is named where it stands; plug-ins are imported, or refused by file and line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmfoundry.config import ConfigError, check
from llmfoundry.layers.rope import RopeScaling
from llmfoundry.model.config import ModelConfig

MODEL = {"name": "causal_lm", "d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 320}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    ("keys", "where"),
    [
        (lambda x: {"expansion_ratio": x}, "expansion_ratio"),
        (lambda x: {"attn_config": {"rope": True, "rope_theta": x}}, "attn_config.rope_theta"),
        (lambda x: {"attn_config": {"rope_scaling": YARN | {"mscale": x}}}, "attn_config.rope_scaling.mscale"),
    ],
)
def test_no_number_is_infinite_or_nan(number: float, keys: Callable[[float], dict[str, object]], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(ModelConfig, MODEL | keys(number), where="model")
    assert f"model.{where}: input should be a finite number, found {number}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"type": "linear", "factor": 0.0},
        LLAMA3 | {"low_freq_factor": 0.0},
        LLAMA3 | {"original_max_position_embeddings": 0},
        YARN | {"factor": -1.0},
        YARN | {"beta_slow": 0.0},
        YARN | {"attention_factor": 0.0},
    ],
)
def test_rope_takes_no_number_that_it_would_divide_by_zero_with(keys: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="input should be greater than 0"):
        check(RopeScaling, keys)
    with pytest.raises(ConfigError, match=r"rope_theta: input should be greater than 0"):
        check(ModelConfig, MODEL | {"attn_config": {"rope": True, "rope_theta": 0.0}})
