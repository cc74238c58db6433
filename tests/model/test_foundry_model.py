"""What LLM Foundry's MPT can do beyond the MPT of `transformers`, against its formulas written out."""

import functools

import pytest
import torch
import torch.nn.functional as F

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.family import write_config
from llmfoundry.layers.lora import adapters
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import Cache, CausalLM, CausalLMConfig
from llmfoundry.parallel.compile import compile_blocks
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


@pytest.mark.parametrize(
    "keys",
    [
        {"logit_scale": 0.5},
        {"logit_scale": "inv_sqrt_d_model"},
        {"attn_reuse_kv_pattern": [0, -1, -1]},
        {"attn_position_pattern": [True, False]},
    ],
    ids=str,
)
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
    with pytest.raises(ConfigError, match="norm_type and norm_eps belong to qk_norm or qk_ln"):
        check(ModelConfig, SMALL | {"attn_config": own})
    with pytest.raises(ConfigError, match="lacks .*norm_type"):
        write_config(check(ModelConfig, SMALL | keys | {"attn_config": {"rope": True, "qk_ln": True} | own}))


def _by_hand(model: CausalLM, tokens: torch.Tensor, layers: list[dict[str, int | bool]]) -> torch.Tensor:
    """LLM Foundry's forward with `block_overrides`: each layer has its window, source of keys, and ALiBi or not."""
    config, x = model.config, model.wte(tokens)
    length, heads = tokens.shape[1], config.n_heads
    far = torch.arange(length)[:, None] - torch.arange(length)  # (S, S) how far back
    slopes = 2.0 ** (-8 / heads * torch.arange(1, heads + 1))
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block, layer in zip(model.blocks, layers, strict=True):
        attention, h = block.attn, block.norm_1(x)
        rows = (attention.wq if layer["reuse"] else attention.wqkv)(h).unflatten(-1, (-1, config.d_model // heads))
        rows = rows.clamp(-0.5, 0.5).transpose(1, 2)  # (B, H [+ 2G], S, C)
        q = attention.q_norm(rows[:, :heads].transpose(1, 2).flatten(2)).unflatten(-1, (heads, -1)).transpose(1, 2)
        if layer["reuse"]:
            k, v = made[len(made) + layer["reuse"]]
        else:
            k, v = rows[:, heads:].chunk(2, dim=1)  # (B, G, S, C)
            k = attention.k_norm(k.transpose(1, 2).flatten(2)).unflatten(-1, (2, -1)).transpose(1, 2)
        made.append((k, v))
        k, v = (each.repeat_interleave(heads // 2, dim=1) for each in (k, v))
        scores = q @ k.transpose(-1, -2) * (config.d_model // heads) ** -0.5
        if layer["positions"]:
            scores = scores - slopes[:, None, None] * far
        seen = (far >= 0) & ((far <= layer["window"]) if layer["window"] != -1 else True)
        y = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        x = x + attention.out_proj(y.transpose(1, 2).flatten(2))
        x = x + block.ffn(block.norm_2(x)).y
    return F.linear(model.norm_f(x), model.wte.weight)


LAYERS = {
    "n_layers": 6,
    "attn_window_pattern": [-1, 4, 4],
    "attn_reuse_kv_pattern": [0, 0, -1, -1, 0, -2],  # so layers 2 and 3 take those of 1, and 5 those of 1 again
    "attn_position_pattern": [True, True, False, True, False, True],
}
ALIBI = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "alibi": True, "qk_ln": True, "clip_qkv": 0.5}


def test_layers_reuse_keys_skip_positions_and_have_windows_of_their_own() -> None:
    model, tokens = _model(**LAYERS, attn_config=ALIBI), _tokens(2, 14)
    config = model.config
    assert [config.kv_source(layer) for layer in range(6)] == [None, None, 1, 1, None, 1]
    assert config.n_params() == sum(p.numel() for p in model.parameters())
    layers = [
        {
            "window": config.window(i),
            "reuse": 0 if source is None else source - i,
            "positions": config.encodes_positions(i),
        }
        for i, source in enumerate(map(config.kv_source, range(6)))
    ]
    torch.testing.assert_close(model(tokens).logits, _by_hand(model, tokens, layers), rtol=1e-6, atol=1e-6)
    saved = check(CausalLMConfig, SMALL | LAYERS | {"attn_reuse_kv_pattern": None, "attn_config": ALIBI}).n_params()
    assert saved - config.n_params() == 3 * (2 * 2 * 12 * (48 + 1) + 2 * 24), "keys, values, and the norm of keys"


@pytest.mark.parametrize("attention", [ALIBI, {"rope": True}], ids=["alibi", "rope"])
@pytest.mark.parametrize("chunks", [(10,) + (1,) * 4, (1,) * 14, (6, 8)])
def test_the_cache_serves_layers_that_reuse_it(attention: dict[str, object], chunks: tuple[int, ...]) -> None:
    model, tokens, cache = _model(**LAYERS, attn_config=attention), _tokens(2, 14), Cache(6)
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in tokens.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, rtol=0, atol=1e-11)
    assert [layer.length for layer in cache.layers] == [14, 14, 0, 0, 14, 0] and cache.length == 14


@pytest.mark.parametrize(
    ("mode", "compiled", "drops"),
    [(mode, False, drops) for mode in ("full", "selective") for drops in (0.0, 0.2)]
    + [("full", True, 0.2), ("selective", True, 0.0)],
)
def test_layers_that_share_learn_the_same_when_computed_again(mode: str, compiled: bool, drops: float) -> None:
    keys = LAYERS | {"attn_config": {"rope": True, "attn_pdrop": drops}, "resid_pdrop": drops, "emb_pdrop": drops}
    tokens, found = _tokens(2, 12), []
    for changed in (False, True):
        model = _model(**keys)
        if changed:
            recompute_blocks(model.blocks, mode, None, in_graph=compiled)
            if compiled:
                torch._dynamo.reset()
                with pytest.MonkeyPatch.context() as patch:  # no code: the graphs
                    patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
                    compile_blocks(model)
        torch.manual_seed(3)
        model(tokens, tokens).loss_sum.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-10, msg=name)
        assert gradient.any(), name


def test_adapters_of_queries_reach_layers_that_have_nothing_else() -> None:
    lora = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    model = _model(**LAYERS, attn_config=ALIBI, lora=lora)
    adapted = {name for name, _, _ in adapters(model)}
    assert adapted == {f"blocks.{i}.attn.{'wq' if i in (2, 3, 5) else 'wqkv'}" for i in range(6)}


@pytest.mark.parametrize("attention", [{"alibi": True}, {}, {"rope": True}], ids=["alibi", "learned", "rope"])
def test_documents_of_a_row_are_told_apart_and_their_positions_are_the_rows(attention: dict[str, bool]) -> None:
    """As in LLM Foundry, whose sequence_id changes the mask alone: only learned positions then tell where a row was."""
    model, tokens = _model(attn_config=attention | {"attn_uses_sequence_id": True}), _tokens(1, 20)
    ids = (torch.arange(20) >= 8).int()[None]
    packed = model(tokens, sequence_ids=ids).logits[:, 8:]
    alone = model(tokens[:, 8:]).logits
    assert torch.allclose(packed, alone, rtol=0, atol=1e-4) == bool(attention)
    shifted = model(tokens[:, 8:], positions=torch.arange(8, 20)[None]).logits
    torch.testing.assert_close(packed, shifted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"attn_reuse_kv_pattern": [-1]}, "must lead to earlier layers"),
        ({"attn_reuse_kv_pattern": [0, 1]}, "must lead to earlier layers"),
        ({"attn_reuse_kv_pattern": []}, "must lead to earlier layers"),
        ({"attn_position_pattern": [False]}, "turns off rope or alibi, and neither is on"),
    ],
)
def test_patterns_without_meaning_are_refused(keys: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(ModelConfig, SMALL | keys)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("alibi", [False, True], ids=["rope", "alibi"])
@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu_the_gradient_is_that_of_what_was_dropped(
    compiled: bool, mode: str, alibi: bool, packed: bool
) -> None:
    """By differences of the loss along the gradient, for each way to run has its own random numbers."""
    attention = {"alibi": alibi, "rope": not alibi, "attn_pdrop": 0.4, "attn_uses_sequence_id": packed}
    shape = {"d_model": 64, "max_seq_len": 128, "n_layers": 3, "attn_reuse_kv_pattern": [0, -1, 0]}
    model = _model(**shape, attn_config=attention, resid_pdrop=0.4, emb_pdrop=0.4).float().cuda()
    recompute_blocks(model.blocks, mode, None, in_graph=compiled)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model)
    tokens, ids = _tokens(4, 128).cuda(), (torch.arange(128, device="cuda") // 50).int().expand(4, -1)

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return model(tokens, tokens, sequence_ids=ids).loss_sum

    loss().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    step, found = 0.5 / norm, []  # the loss changes by about 0.5 of some 2,000 nats, each side
    for sign in (1, -2):
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.add_(g, alpha=sign * step / norm)
        found.append(loss().item())
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(norm, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [ALIBI, {"rope": True}], ids=["alibi", "rope"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_layers_that_share_are_the_same_on_a_gpu(attention: dict[str, object], compiled: bool) -> None:
    keys = LAYERS | {"d_model": 64, "max_seq_len": 128, "attn_config": attention}
    model, tokens = _model(**keys), _tokens(2, 128)
    model(tokens, tokens).loss_sum.backward()
    true = {name: p.grad for name, p in model.named_parameters()}
    model = _model(**keys).float().cuda()
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model)
    model(tokens.cuda(), tokens.cuda()).loss_sum.backward()
    # torch's Triton template may use TF32, whose mantissa has 10 bits. The bias of keys moves all scores of a query by
    # as much: its gradient is 0 but for rounding.
    least = 1e-4 * max(gradient.norm().item() for gradient in true.values())
    for name, p in model.named_parameters():
        assert (p.grad.double().cpu() - true[name]).norm() <= 2e-2 * true[name].norm() + least, name
