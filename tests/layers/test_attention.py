import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from llmfoundry.config import ConfigError, check
from llmfoundry.layers import attention, flex
from llmfoundry.layers.attention import (
    Attention,
    AttentionConfig,
    GroupedQueryConfig,
    attention_mask,
)
from llmfoundry.layers.kv_cache import KVCache
from llmfoundry.layers.norm import NormConfig
from llmfoundry.layers.rope import NoScaling, rope_table
from llmfoundry.layers.scores import alibi_bias, alibi_slopes, plain_attention

CPU = torch.device("cpu")
D, H = 48, 6


def _config(**keys: object) -> GroupedQueryConfig:
    keys.setdefault("attn_type", "grouped_query_attention" if "kv_n_heads" in keys else "multihead_attention")
    config = check(AttentionConfig, keys).filled(bias=False)
    assert isinstance(config, GroupedQueryConfig)
    config.check(D, H)
    return config


def _attention(config: GroupedQueryConfig) -> Attention:
    module = config.build(D, H, NormConfig(norm_type="rmsnorm")).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def _run(module: Attention, x: Tensor, window: int = -1, sequence_ids: Tensor | None = None) -> Tensor:
    mask = attention_mask(module.config, window, x.shape[1], 0, sequence_ids, CPU)
    return module(x, rope_table(NoScaling(), 100.0, module.head_dim, torch.arange(x.shape[1])), mask)


CONFIGS = {
    "multihead": _config(),
    "grouped": _config(kv_n_heads=2, bias=True, out_bias=True),
    "multiquery": _config(attn_type="multiquery_attention"),
    "wide heads": _config(kv_n_heads=3, head_dim=16, qk_norm=True),
    "norm of all heads": _config(kv_n_heads=2, qk_ln=True, clip_qkv=0.5),
    "sinks": _config(kv_n_heads=2, sinks=True),
    "softcap": _config(attn_logit_softcapping=2.0),
    "alibi": _config(alibi=True, kv_n_heads=2),
    "alibi and softcap": _config(alibi=True, alibi_bias_max=4, attn_logit_softcapping=2.0, sinks=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@each_config
def test_counts_as_built(config: GroupedQueryConfig) -> None:
    built = sum(p.numel() for p in _attention(config).parameters())
    assert config.n_params(D, H, NormConfig(norm_type="rmsnorm")) == built


@each_config
@pytest.mark.parametrize("window", [-1, 3])
def test_is_causal_and_sees_its_window(config: GroupedQueryConfig, window: int) -> None:
    module, x = _attention(config), torch.randn(1, 10, D, dtype=torch.float64)
    moved = x.clone()
    moved[0, 4] += 1
    changed = (_run(module, x, window) - _run(module, moved, window)).abs().amax(-1)[0] > 1e-9
    last = 9 if window == -1 else 4 + window
    assert changed.tolist() == [4 <= at <= last for at in range(10)]


@each_config
@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("chunks", [(10,), (4, 6), (1,) * 10, (5, 1, 4)])
def test_cache_gives_what_one_pass_gives(config: GroupedQueryConfig, window: int, chunks: tuple[int, ...]) -> None:
    module, x, cache = _attention(config), torch.randn(2, 10, D, dtype=torch.float64), KVCache()
    parts = []
    for part in x.split(chunks, dim=1):
        start, n = cache.length, part.shape[1]
        rope = rope_table(NoScaling(), 100.0, module.head_dim, torch.arange(start, start + n))
        parts.append(module(part, rope, attention_mask(config, window, n, start, None, CPU), cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), _run(module, x, window), rtol=0, atol=1e-12)


@each_config
def test_documents_do_not_see_each_other(config: GroupedQueryConfig) -> None:
    module, x = _attention(config), torch.randn(2, 9, D, dtype=torch.float64)
    ids = torch.tensor([[0] * 4 + [1] * 5, [3] * 9], dtype=torch.int32)
    y = _run(module, x, sequence_ids=ids)
    # Rotary positions are relative, so a document alone, starting at 0, gives the same; angles are float32.
    torch.testing.assert_close(y[:1, 4:], _run(module, x[:1, 4:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(y[:1, :4], _run(module, x[:1, :4]), rtol=0, atol=1e-12)
    torch.testing.assert_close(y[1:], _run(module, x[1:]), rtol=0, atol=1e-12)


def test_fused_path_equals_plain_attention() -> None:
    q, k, v = (torch.randn(2, heads, 12, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    plain = plain_attention(q, k, v, causal, 0.3)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-12)
    g = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(plain, (q, k, v), g), torch.autograd.grad(fused, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_sinks_equal_transformers() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups, module.training = torch.nn.Parameter(torch.randn(6)), 3, False
    q, k, v = (torch.randn(2, heads, 7, 8) for heads in (6, 2, 2))
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    bias = torch.zeros(7, 7).masked_fill(~causal, float("-inf"))[None, None]
    theirs, _ = eager_attention_forward(module, q, k, v, bias, scaling=0.3)
    ours = plain_attention(q, k, v, causal, 0.3, sinks=module.sinks)
    torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 16, 71, 112])
@pytest.mark.parametrize("bias_max", [8, 3])
def test_alibi_slopes_have_the_bits_of_transformers(n_heads: int, bias_max: int) -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    theirs = build_mpt_alibi_tensor(n_heads, 5, bias_max)  # (H, 1, P), as the last query sees it
    slopes = alibi_slopes(n_heads, bias_max, CPU)
    assert slopes.dtype == torch.float32 and torch.equal(alibi_bias(slopes, 1, 5), theirs)
    assert torch.equal(alibi_bias(slopes, 3, 5)[:, -1:], theirs)  # two keys came before these three queries


def test_alibi_through_sdpa_equals_the_plain_path() -> None:
    config = _config(alibi=True, kv_n_heads=2)
    module, x = _attention(config), torch.randn(2, 12, D, dtype=torch.float64)
    q, (k, v) = module._project(x, None)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    plain = plain_attention(q, k, v, causal, module.scale, bias=alibi_bias(alibi_slopes(H, 8, CPU), 12, 12))
    y = module(x, None, attention_mask(config, -1, 12, 0, None, CPU))
    torch.testing.assert_close(y, module.out_proj(plain.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


def test_clip_comes_before_the_norm_unless_said_otherwise() -> None:
    x = torch.randn(1, 3, D, dtype=torch.float64)
    for after in (False, True):
        module = _attention(_config(qk_ln=True, clip_qkv=0.1, clip_qkv_after_norm=after))
        q, (k, v) = module._project(x, None)
        assert v.abs().max() == 0.1
        assert (q.abs().max() <= 0.1) == (k.abs().max() <= 0.1) == after


@pytest.mark.parametrize("keys", [{"qk_norm": True}, {"qk_ln": True, "norm_eps": 0.1}], ids=str)
def test_norm_and_rotation_in_one_pass_equal_those_in_parts(
    keys: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    module, x = _attention(_config(kv_n_heads=2, rope=True, **keys)).float(), torch.randn(2, 5, D)
    rope = rope_table(NoScaling(), 100.0, module.head_dim, torch.arange(5))
    parts = module._project(x, rope)
    monkeypatch.setattr(attention, "has_kernel", lambda _: True)
    whole = module._project(x, rope)
    assert "NormRotate" in str(whole[1].v.grad_fn.next_functions) and "NormRotate" not in str(parts[1].v.grad_fn)
    for one, other in zip((whole[0], *whole[1]), (parts[0], *parts[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_plain_causal_attention_builds_no_mask() -> None:
    assert attention_mask(_config(), -1, 100, 0, None, CPU) is None
    assert attention_mask(_config(), 99, 100, 0, None, CPU) is None  # the window holds all
    assert attention_mask(_config(), -1, 1, 50, None, CPU) is None  # one query sees the whole cache


def test_cache_grows_and_keeps_what_it_holds() -> None:
    cache, k = KVCache(capacity=3), torch.randn(1, 2, 20, 4)
    for start, end in ((0, 2), (2, 3), (3, 9), (9, 20)):
        all_k, all_v = cache.append(k[:, :, start:end], -k[:, :, start:end])
        assert torch.equal(all_k, k[:, :, :end]) and torch.equal(all_v, -k[:, :, :end])
    assert cache.length == 20


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"qk_norm": True, "qk_ln": True}, "exclude each other"),
        ({"kv_n_heads": 4}, "n_heads=6 is not divisible by kv_n_heads=4"),
        ({"attn_type": "grouped_query_attention"}, "needs kv_n_heads"),
        ({"attn_type": "multihead_attention", "kv_n_heads": 2}, "contradicts attn_type=multihead_attention"),
        ({"head_dim": 7, "rope": True}, "head_dim=7 is odd"),
        ({"sinks": True, "attn_impl": "sdpa"}, "attn_impl=sdpa"),
        ({"rope": True, "alibi": True}, "attn_config.rope and attn_config.alibi are both on"),
    ],
)
def test_sizes_that_do_not_fit_are_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**keys)


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'kv_n_heads'"):
        check(AttentionConfig, {"kv_heads": 2})


def test_flex_off_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="attn_impl=flex needs a CUDA device"):
        attention_mask(_config(attn_impl="flex"), -1, 8, 0, None, CPU)


@each_config
@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("documents", [False, True])
def test_flex_equals_plain_uncompiled(
    config: GroupedQueryConfig, window: int, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_compile", lambda: flex._attend)  # torch's own reference, which any CPU runs
    module, x = _attention(config), torch.randn(2, 24, D, dtype=torch.float64)
    ids = torch.arange(24).div(9, rounding_mode="floor").int().repeat(2, 1) if documents else None
    mask = flex.block_mask(flex.NO_WINDOW if window == -1 else window, 24, ids, CPU)
    rope = rope_table(NoScaling(), 100.0, module.head_dim, torch.arange(24))
    with torch.no_grad():  # it has no backward there
        # FlexAttention's log-sum-exp, which sinks need, is float32.
        torch.testing.assert_close(module(x, rope, mask), _run(module, x, window, ids), rtol=1e-6, atol=1e-6)


MASKS = [(-1, False), (-1, True), (40, False), (40, True)]  # window, documents


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "window", "documents"),
    [("grouped", *mask) for mask in MASKS] + [(name, 40, True) for name in CONFIGS if name != "grouped"],
)
def test_flex_equals_plain_on_cuda(name: str, window: int, documents: bool) -> None:
    """All in one process, as many kinds as it may have, though torch keeps eight graphs of one function."""
    wide = CONFIGS[name].model_copy(update={"head_dim": 16, "attn_impl": "flex"})  # FlexAttention's least
    module = _attention(wide.model_copy(update={"attn_impl": "auto"}))
    x = torch.randn(2, 200, D, dtype=torch.float64, requires_grad=True)
    ids = (torch.arange(200, dtype=torch.int32) // 70).expand(2, -1) if documents else None
    expected = _run(module, x, window, ids)
    dy = torch.randn_like(expected)
    true = [expected, *torch.autograd.grad(expected, (x, *module.parameters()), dy)]
    module, x = module.float().cuda(), x.detach().float().cuda().requires_grad_()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        mask = attention_mask(wide, window, 200, 0, None if ids is None else ids.cuda(), x.device)
        y = module(x, rope_table(NoScaling(), 100.0, 16, torch.arange(200, device="cuda")), mask)
        found = [y, *torch.autograd.grad(y, (x, *module.parameters()), dy.float().cuda())]
    for ours, theirs in zip(found, true, strict=True):
        # Float32 against float64; torch's Triton template may use TF32, whose mantissa has 10 bits.
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=0, atol=2e-2 * theirs.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "dim"), [(16, 16, 128), (32, 4, 128), (32, 8, 64)])
def test_auto_is_cudnn_on_hopper(heads: int, groups: int, dim: int) -> None:
    """It was measured at 1.5 to 2 times the speed of torch's other kernels, 2,048 to 32,768 tokens."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    q, k, v = (torch.randn(2, 4096, n, dim, device="cuda", dtype=torch.bfloat16) for n in (heads, groups, groups))
    q, k, v = (each.transpose(1, 2).requires_grad_() for each in (q, k, v))
    choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=heads != groups)
    assert choice == SDPBackend.CUDNN_ATTENTION.value


@pytest.mark.gpu
def test_flex_gives_the_same_bits_twice() -> None:
    """Backward of cuDNN and of flash attention does not: it adds to the queries' gradients in any order."""
    config = _config(kv_n_heads=2, head_dim=128, qk_norm=True, rope=True, attn_impl="flex")
    module, cuda = _attention(config).to("cuda", torch.bfloat16), torch.device("cuda")
    x = torch.randn(8, 4096, D, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    mask = attention_mask(config, -1, 4096, 0, None, cuda)
    rope = rope_table(NoScaling(), 100.0, 128, torch.arange(4096, device=cuda))
    runs = [torch.autograd.grad(module(x, rope, mask).sum(), (x, *module.parameters())) for _ in range(3)]
    assert all(map(torch.equal, runs[0] + runs[0], runs[1] + runs[2]))
