"""Blocks with adapters compile as one graph each: with dropout, in half precision, with experts, on weights in NF4."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from llmfoundry.config import check
from llmfoundry.layers.lora import adapters, adapters_off, frozen_weights
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.parallel.compile import compile_blocks
from llmfoundry.parallel.recompute import recompute_blocks

pytestmark = pytest.mark.slow
MOE = {"ffn_type": "moe", "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "moe_impl": "triton"}
DENSE = {"ffn_type": "mptglu", "ffn_hidden_size": 48}


class Case(NamedTuple):
    """One way to train adapters."""

    ffn: dict[str, object]
    lora: dict[str, object]
    recompute: str
    dtype: torch.dtype = torch.float32


CASES = {
    "nf4, dropout": Case(DENSE, {"quantize": "nf4", "dropout": 0.2}, "full"),
    "bf16": Case(DENSE, {}, "selective", torch.bfloat16),
    "experts": Case(MOE, {}, "full"),
    "experts in nf4": Case(MOE, {"quantize": "nf4"}, "selective"),
}


def _model(case: Case) -> CausalLM:
    keys = {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 24, "norm_type": "rmsnorm",
        "no_bias": True, "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True},
        "ffn_config": case.ffn | {"ffn_act_fn": {"name": "silu"}},
        "init_config": {"name": "normal_", "init_std": 0.2}, "lora": {"rank": 3, "alpha": 6.0} | case.lora,
    }  # fmt: skip
    model = check(CausalLMConfig, keys).build()
    init_weights(model, 3)
    with torch.no_grad():
        for _, _, b in adapters(model):
            b.fill_(0.1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(case.dtype)
    for _, frozen in frozen_weights(model):
        frozen.quantize_(torch.randn(frozen.shape) * 0.1)
    return model


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_compiled_they_learn_the_same_also_after_they_were_off(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter's own test")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no code: the graphs
    torch._dynamo.reset()
    counters.clear()
    model, tokens = _model(case), torch.randint(0, 61, (2, 12))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(4)  # of dropout
        model(tokens).logits.square().mean().backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    with torch.no_grad(), adapters_off(model):
        base = model(tokens).logits
    true = gradients()
    recompute_blocks(model.blocks, case.recompute, None, in_graph=True)
    compile_blocks(model)
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
    for _ in range(2):
        for name, value in gradients().items():
            assert (value - true[name]).norm() <= tolerance * true[name].norm(), name
        with torch.no_grad(), adapters_off(model):
            torch.testing.assert_close(model(tokens).logits, base, rtol=tolerance, atol=tolerance)
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"], "with, without, and off"
    torch._dynamo.reset()
