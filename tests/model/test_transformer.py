from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmfoundry.config import check
from llmfoundry.layers.ffn import FFNConfig, FFNOutput, MLPConfig, RouterStats
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import Cache, CausalLM, CausalLMConfig
from llmfoundry.moe.router import layer_keys

SIZES = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2,
}  # fmt: skip
OURS = {
    "vocab_size": 101, "d_model": 48, "n_heads": 6, "n_layers": 3, "max_seq_len": 64, "no_bias": True,
    "norm_type": "rmsnorm", "norm_eps": 1e-6, "tie_word_embeddings": False,
    "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 80, "ffn_act_fn": {"name": "silu"}},
}  # fmt: skip
GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def _llama(scaling: str, **rest: object) -> tuple[PreTrainedModel, dict[str, object]]:
    rope = {"rope_type": scaling, "rope_theta": 500.0, **rest}
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope))
    attention = GROUPED | {"rope_theta": 500.0, "rope_scaling": {"type": scaling, **rest}}
    return theirs, OURS | {"attn_config": attention}


def _qwen2() -> tuple[PreTrainedModel, dict[str, object]]:
    layers = ["full_attention", "sliding_attention", "sliding_attention"]
    theirs = Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, layer_types=layers, tie_word_embeddings=True)
    )
    changes = {"attn_window_pattern": [-1, 4, 4], "tie_word_embeddings": True}
    return theirs, OURS | changes | {"attn_config": GROUPED | {"bias": True}}


def _qwen3() -> tuple[PreTrainedModel, dict[str, object]]:
    theirs = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    return theirs, OURS | {"attn_config": GROUPED | {"head_dim": 16, "qk_norm": True}}


def _copy_llama_like(theirs: PreTrainedModel, ours: CausalLM) -> None:
    state = theirs.state_dict()
    ours.wte.weight.copy_(state["model.embed_tokens.weight"])
    ours.norm_f.weight.copy_(state["model.norm.weight"])
    if ours.lm_head is not None:
        ours.lm_head.weight.copy_(state["lm_head.weight"])
    for layer, block in enumerate(ours.blocks):
        part = {name.removeprefix(f"model.layers.{layer}."): value for name, value in state.items()}
        qkv = [f"self_attn.{which}_proj" for which in "qkv"]
        block.attn.wqkv.weight.copy_(torch.cat([part[f"{name}.weight"] for name in qkv]))
        if block.attn.wqkv.bias is not None:
            block.attn.wqkv.bias.copy_(torch.cat([part[f"{name}.bias"] for name in qkv]))
        block.attn.out_proj.weight.copy_(part["self_attn.o_proj.weight"])
        if block.attn.config.qk_norm:
            block.attn.q_norm.weight.copy_(part["self_attn.q_norm.weight"])
            block.attn.k_norm.weight.copy_(part["self_attn.k_norm.weight"])
        block.norm_1.weight.copy_(part["input_layernorm.weight"])
        block.norm_2.weight.copy_(part["post_attention_layernorm.weight"])
        gate_up = [part[f"mlp.{which}_proj.weight"] for which in ("gate", "up")]
        block.ffn.w1.weight.copy_(torch.cat(gate_up))
        block.ffn.w2.weight.copy_(part["mlp.down_proj.weight"])


def _norms_in_full_precision(theirs: PreTrainedModel) -> None:
    """Their RMSNorm rounds to float32 inside, whatever the model's dtype, which by itself would cost 1e-6."""
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(
                F.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )


FAMILIES = {
    "llama": lambda: _llama("default"),
    "llama linear": lambda: _llama("linear", factor=4.0),
    "llama llama3": lambda: _llama("llama3", **LLAMA3),
    "llama yarn": lambda: _llama("yarn", **YARN),
    "qwen2 sliding tied": _qwen2,
    "qwen3": _qwen3,
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_logits_and_loss_equal_transformers(family: object) -> None:
    theirs, keys = family()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases too, which start as ones and zeros
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours = check(ModelConfig, keys).build()
    with torch.no_grad():
        _copy_llama_like(theirs, ours)
    tokens = torch.randint(0, 101, (2, 40))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        if dtype == torch.float64:
            _norms_in_full_precision(theirs)
        expected = theirs(tokens, labels=tokens)
        torch.testing.assert_close(ours(tokens).logits, expected.logits, rtol=tolerance, atol=tolerance)
        loss = ours(tokens, labels).loss_sum / (labels != -100).sum()
        torch.testing.assert_close(loss, expected.loss.to(dtype), rtol=1e-5, atol=0)  # theirs is float32


def test_gpt2_logits_equal_transformers() -> None:
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=64, n_embd=48, n_layer=2, n_head=6)).eval()
    gelu = {"name": "gelu", "approximate": "tanh"}
    ours = check(ModelConfig, {
        "vocab_size": 101, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64,
        "ffn_config": {"ffn_act_fn": gelu},
    }).build()  # fmt: skip
    names = {
        "norm_1": "ln_1", "norm_2": "ln_2", "attn.wqkv": "attn.c_attn", "attn.out_proj": "attn.c_proj",
        "ffn.w1": "mlp.c_fc", "ffn.w2": "mlp.c_proj",
    }  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        state = theirs.transformer.state_dict()
        for name in ("wte", "wpe"):
            getattr(ours, name).weight.copy_(state[f"{name}.weight"])
        for leaf in ("weight", "bias"):
            getattr(ours.norm_f, leaf).copy_(state[f"ln_f.{leaf}"])
            for layer, block in enumerate(ours.blocks):
                for our, their in names.items():
                    value = state[f"h.{layer}.{their}.{leaf}"]
                    block.get_submodule(our).get_parameter(leaf).copy_(value.T if value.dim() == 2 else value)
    tokens = torch.randint(0, 101, (2, 40))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=2e-5, atol=2e-5)


class TwoWayConfig(FFNConfig, names=("test_two_way",)):
    """A routed block in every second layer: half of its rows of w1 are active. Stands for any plug-in."""

    def for_layer(self, index: int) -> FFNConfig:
        return self if index % 2 else MLPConfig(ffn_hidden_size=self.ffn_hidden_size, bias=self.bias)

    def n_params(self, d_model: int) -> int:
        return 2 * d_model

    def n_active_params(self, d_model: int) -> int:
        return d_model

    def build(self, d_model: int, n_layers: int, layer_index: int) -> nn.Module:
        return TwoWay(d_model, layer_index)


class TwoWay(nn.Module):
    """Scales each token by one of two vectors; says which layer it is in its statistics."""

    def __init__(self, d_model: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.w1 = nn.Parameter(torch.empty(2, d_model))

    def forward(self, x: Tensor, keys: Tensor | None = None) -> FFNOutput:
        noise = torch.zeros(()) if keys is None else keys.sum()
        which = (x.sum(-1) > 0).long()
        stats = RouterStats(
            torch.bincount(which.flatten(), minlength=2).float(),
            torch.zeros(2),
            noise,
            torch.tensor(self.layer),
        )
        return FFNOutput(x * self.w1[which], stats)


def _model(**keys: object) -> CausalLM:
    config = check(ModelConfig, OURS | {"attn_config": GROUPED} | keys)
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    init_weights(model, 3)
    return model.double()


def test_layers_of_two_kinds_interleave_and_stack_their_statistics() -> None:
    model = _model(n_layers=5, ffn_config={"ffn_type": "test_two_way"})
    config, tokens = model.config, torch.randint(0, 101, (2, 8))
    assert isinstance(config, CausalLMConfig)
    assert config.n_params() == sum(p.numel() for p in model.parameters())
    assert config.n_params() - config.n_active_params() == 2 * 48
    keys = torch.tensor([4, 5])
    router = model(tokens, keys=keys).router
    assert router.load.shape == (2, 2) and router.load.sum(-1).tolist() == [16, 16]
    assert router.z_sum.tolist() == [int(layer_keys(keys, layer).sum()) for layer in (1, 3)]
    assert router.entropy_sum.tolist() == [1, 3]
    assert _model()(tokens).router is None


CACHED = {
    "rope": {},
    "learned positions": {"attn_config": {}, "tie_word_embeddings": True},
    "windows": {"attn_window_pattern": [3, -1]},
    "softcap": {"final_logit_softcapping": 5.0, "attn_config": GROUPED | {"attn_logit_softcapping": 3.0}},
    "sinks": {"attn_config": GROUPED | {"sinks": True}, "attn_window_pattern": [-1, 5]},
    "yarn": {"attn_config": GROUPED | {"rope_scaling": {"type": "yarn", **YARN}}},
}


@pytest.mark.parametrize("keys", CACHED.values(), ids=CACHED.keys())
@pytest.mark.parametrize("chunks", [(12,) + (1,) * 8, (1,) * 20, (7, 13)])
def test_decoding_with_a_cache_equals_one_forward(keys: dict[str, object], chunks: tuple[int, ...]) -> None:
    model, tokens, cache = _model(**keys), torch.randint(0, 101, (3, 20)), Cache(3, capacity=16)
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in tokens.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, rtol=0, atol=1e-11)
        assert cache.length == 20
        last = model(tokens, last_only=True).logits
    torch.testing.assert_close(last, torch.cat(parts, dim=1)[:, -1:], rtol=0, atol=1e-11)


PADDED = CACHED | {
    "alibi": {"attn_config": {"alibi": True}, "attn_window_pattern": [-1, 4]},
    "latent": {"attn_config": {"attn_type": "multihead_latent_attention", "kv_lora_rank": 8, "qk_nope_head_dim": 6,
                               "qk_rope_head_dim": 4, "v_head_dim": 5}},
    "mixture": {"ffn_config": {"ffn_type": "moe", "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}},
}  # fmt: skip


@pytest.mark.parametrize("keys", PADDED.values(), ids=PADDED.keys())
def test_rows_padded_on_the_left_are_the_rows_alone(keys: dict[str, object]) -> None:
    model, lengths, new = _model(**keys), [5, 12, 1], 6
    rows = [torch.randint(0, 101, (1, length + new)) for length in lengths]
    padding = torch.tensor([12 - length for length in lengths])
    padded = torch.cat([F.pad(row, (12 + new - row.shape[1], 0)) for row in rows])  # (3, 18)
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for cache in [Cache(3, padding=padding)]
                 for part in padded.split((9, 3) + (1,) * new, dim=1)]  # fmt: skip
        for row, found in zip(rows, torch.cat(parts, dim=1), strict=True):
            torch.testing.assert_close(found[18 - row.shape[1] :], model(row).logits[0], rtol=0, atol=1e-11)
    assert all(part.isfinite().all() for part in parts)


def test_loss_is_the_sum_over_labels_that_count_with_its_gradients() -> None:
    for tied in (True, False):
        model, tokens = _model(tie_word_embeddings=tied), torch.randint(0, 101, (3, 20))
        labels = torch.randint(0, 101, (3, 20))
        labels[1, 4:] = -100
        parameters = list(model.parameters())
        output = model(tokens, labels)
        assert output.logits is None
        plain = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum")
        torch.testing.assert_close(output.loss_sum, plain, rtol=1e-12, atol=0)
        ours, theirs = (
            torch.autograd.grad(output.loss_sum, parameters),
            torch.autograd.grad(plain, parameters),
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_packed_documents_are_told_apart_only_when_asked() -> None:
    tokens = torch.randint(0, 101, (1, 20))
    ids = (torch.arange(20, dtype=torch.int32) >= 8).int()[None]
    apart = _model(attn_config=GROUPED | {"attn_uses_sequence_id": True})
    alone = apart(tokens[:, 8:]).logits
    # The document starts at position 8 instead of 0, and angles are float32.
    torch.testing.assert_close(apart(tokens, sequence_ids=ids).logits[:, 8:], alone, rtol=0, atol=1e-4)
    together = _model()
    assert torch.equal(together(tokens, sequence_ids=ids).logits, together(tokens).logits)


def test_forward_writes_nothing_to_the_modules() -> None:
    model, tokens = _model(ffn_config={"ffn_type": "test_two_way"}), torch.randint(0, 101, (2, 8))
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model(tokens, tokens).loss_sum.backward()
    assert before == {name: set(module.__dict__) for name, module in model.named_modules()}
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_runs_in_the_dtype_of_its_parameters() -> None:
    model, tokens = _model(attn_config=GROUPED | {"qk_norm": True}), torch.randint(0, 101, (2, 8))
    exact = model(tokens, tokens).loss_sum
    for dtype, tolerance in (
        (torch.float32, 1e-5),
        (torch.bfloat16, 0.05),
    ):  # bf16: 8 bits, some 20 layers deep
        model = model.to(dtype)
        assert model(tokens).logits.dtype == dtype
        loss = model(tokens, tokens).loss_sum
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=0)


def test_more_tokens_than_learned_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens exceed the 64 learned positions"):
        _model(attn_config={})(torch.zeros(1, 65, dtype=torch.int64))
