import math

import pytest
import torch
from torch import Tensor

from llmfoundry.config import check
from llmfoundry.layers import flex
from llmfoundry.layers.attention import AttentionConfig, attention_mask
from llmfoundry.layers.kv_cache import KVCache
from llmfoundry.layers.latent_attention import LatentAttention, LatentConfig
from llmfoundry.layers.norm import NormConfig
from llmfoundry.layers.rope import NoScaling, rope_table

CPU = torch.device("cpu")
D, H = 40, 3
SIZES = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def _config(**keys: object) -> LatentConfig:
    keys = {"attn_type": "multihead_latent_attention"} | SIZES | keys
    config = check(AttentionConfig, keys).filled(bias=False)
    assert isinstance(config, LatentConfig)
    config.check(D, H)
    return config


def _attention(config: LatentConfig) -> LatentAttention:
    module = config.build(D, H, NormConfig(norm_type="rmsnorm")).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def _run(module: LatentAttention, x: Tensor, window: int = -1, sequence_ids: Tensor | None = None) -> Tensor:
    mask = attention_mask(module.config, window, x.shape[1], 0, sequence_ids, CPU)
    return module(x, rope_table(NoScaling(), 100.0, 8, torch.arange(x.shape[1])), mask)


CONFIGS = {
    "plain queries": _config(),
    "latent queries": _config(q_lora_rank=20, bias=True, out_bias=True),
    "biases, plain queries": _config(bias=True),
    "halves, odd values": _config(rope_interleaved=False, v_head_dim=7),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@each_config
def test_counts_as_built(config: LatentConfig) -> None:
    built = sum(p.numel() for p in _attention(config).parameters())
    assert config.n_params(D, H, NormConfig()) == built
    assert config.score_dims(D, H) == H * (12 + 8 + config.v_head_dim) / 2


@each_config
@pytest.mark.parametrize("window", [-1, 3])
def test_is_causal_and_sees_its_window(config: LatentConfig, window: int) -> None:
    module, x = _attention(config), torch.randn(1, 10, D, dtype=torch.float64)
    moved = x.clone()
    moved[0, 4] += 1
    changed = (_run(module, x, window) - _run(module, moved, window)).abs().amax(-1)[0] > 1e-9
    last = 9 if window == -1 else 4 + window
    assert changed.tolist() == [4 <= at <= last for at in range(10)]


@each_config
@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("chunks", [(10,), (4, 6), (1,) * 10, (5, 1, 4)])
def test_cache_gives_what_one_pass_gives(config: LatentConfig, window: int, chunks: tuple[int, ...]) -> None:
    module, x, cache = _attention(config), torch.randn(2, 10, D, dtype=torch.float64), KVCache()
    parts = []
    for part in x.split(chunks, dim=1):
        start, n = cache.length, part.shape[1]
        rope = rope_table(NoScaling(), 100.0, 8, torch.arange(start, start + n))
        parts.append(module(part, rope, attention_mask(config, window, n, start, None, CPU), cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), _run(module, x, window), rtol=0, atol=1e-12)


def test_cache_holds_a_latent_and_one_rotated_key() -> None:
    module, cache = _attention(_config()), KVCache(capacity=10)
    module(torch.randn(2, 10, D, dtype=torch.float64), None, None, cache)
    assert sum(buffer.numel() for buffer in cache._buffers) == 2 * 10 * (16 + 8)


@each_config
def test_documents_do_not_see_each_other(config: LatentConfig) -> None:
    module, x = _attention(config), torch.randn(2, 9, D, dtype=torch.float64)
    ids = torch.tensor([[0] * 4 + [1] * 5, [3] * 9], dtype=torch.int32)
    y = _run(module, x, sequence_ids=ids)
    # Rotary positions are relative, so a document alone, starting at 0, gives the same; angles are float32.
    torch.testing.assert_close(y[:1, 4:], _run(module, x[:1, 4:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(y[:1, :4], _run(module, x[:1, :4]), rtol=0, atol=1e-12)
    torch.testing.assert_close(y[1:], _run(module, x[1:]), rtol=0, atol=1e-12)


def test_scale_has_the_square_of_yarns_magnitude_only_for_mscale_all_dim() -> None:
    plain = 1 / math.sqrt(20)
    magnitude = 0.1 * 0.7 * math.log(4.0) + 1
    assert _config().scale == plain
    assert _config(rope_scaling=YARN).scale == plain
    assert _config(rope_scaling=YARN | {"mscale": 1.0}).scale == plain
    assert _config(rope_scaling=YARN | {"mscale_all_dim": 0.7}).scale == pytest.approx(plain * magnitude**2)
    assert _config(softmax_scale=0.5, rope_scaling=YARN | {"mscale_all_dim": 0.7}).scale == 0.5


def test_odd_rotary_dims_are_named() -> None:
    with pytest.raises(ValueError, match="qk_rope_head_dim=7 is odd"):
        _config(qk_rope_head_dim=7)


@each_config
@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("documents", [False, True])
def test_flex_equals_plain_uncompiled(
    config: LatentConfig, window: int, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_compile", lambda: flex._attend)  # torch's own reference, which any CPU runs
    ours, x = _attention(config), torch.randn(2, 24, D, dtype=torch.float64)
    ids = torch.arange(24).div(9, rounding_mode="floor").int().repeat(2, 1) if documents else None
    mask = flex.block_mask(flex.NO_WINDOW if window == -1 else window, 24, ids, CPU)
    with torch.no_grad():  # it has no backward there
        y = ours(x, rope_table(NoScaling(), 100.0, 8, torch.arange(24)), mask)
        torch.testing.assert_close(y, _run(ours, x, window, ids), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "window"), [("plain queries", -1), ("latent queries", 40)])
@pytest.mark.parametrize("documents", [False, True])
def test_flex_equals_plain_on_cuda(name: str, window: int, documents: bool) -> None:
    wide = CONFIGS[name].model_copy(update={"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16})
    module, x = _attention(wide), torch.randn(2, 200, D, dtype=torch.float64)
    ids = torch.arange(200).div(70, rounding_mode="floor").int().repeat(2, 1) if documents else None
    rope = rope_table(NoScaling(), 100.0, 16, torch.arange(200))
    plain = module(x, rope, attention_mask(wide, window, 200, 0, ids, CPU))
    here, cuda = module.float().cuda(), torch.device("cuda")
    mask = attention_mask(
        wide.model_copy(update={"attn_impl": "flex"}), window, 200, 0, None if ids is None else ids.cuda(), cuda
    )
    y = here(x.float().cuda(), rope_table(NoScaling(), 100.0, 16, torch.arange(200, device=cuda)), mask)
    torch.testing.assert_close(y.cpu().double(), plain, rtol=1e-3, atol=1e-3)
