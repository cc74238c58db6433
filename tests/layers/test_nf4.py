"""NF4: the published levels, the packing of bitsandbytes, and layers that run on it."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmfoundry.config import check
from llmfoundry.layers import nf4
from llmfoundry.layers.lora import adapters, frozen_weights
from llmfoundry.layers.nf4 import LEVELS, NF4Weight, dequantize, quantize
from llmfoundry.model.adapters import folded
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.parallel.recompute import recompute_blocks


def test_levels_are_halves_of_a_normal_distribution() -> None:
    """As the paper makes them: equally likely parts on each side of zero, scaled to one."""
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    found = torch.cat([below, torch.zeros(1), above.flip(0)])
    torch.testing.assert_close(found / found.abs().max(), torch.tensor(LEVELS), rtol=0, atol=1e-4)


def test_each_value_takes_its_nearest_level() -> None:
    values = torch.randn(64 * 50) * torch.rand(50).repeat_interleave(64)
    codes, scales = quantize(values)
    assert codes.dtype == torch.uint8 and codes.shape == (64 * 25,)
    blocks = values.view(-1, 64)
    torch.testing.assert_close(scales, blocks.abs().amax(1))
    choices = torch.tensor(LEVELS) * scales[:, None, None]  # (blocks, 1, 16)
    nearest = (blocks.unsqueeze(2) - choices).abs().amin(2)
    made = dequantize(codes, scales, torch.float32).view(-1, 64)
    torch.testing.assert_close((blocks - made).abs(), nearest, rtol=0, atol=1e-6)
    assert torch.equal(*(dequantize(*quantize(each), torch.float32) for each in (values, made.flatten())))
    assert not dequantize(*quantize(torch.zeros(64)), torch.float32).any()


def test_parts_give_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 10, 64)
    module = NF4Weight(weight)
    monkeypatch.setattr(nf4, "_AT_ONCE", 128)
    module.quantize_(weight)
    assert torch.equal(module(torch.bfloat16).flatten(), dequantize(*quantize(weight.flatten()), torch.bfloat16))
    assert not module.state_dict()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_a_cast_of_the_model_changes_no_weight(cast: str) -> None:
    weight = torch.randn(3, 10, 64)
    module = NF4Weight(weight)
    module.quantize_(weight)
    model, exact = torch.nn.Sequential(torch.nn.Linear(4, 4), module), module(torch.float32)
    getattr(model, cast)()
    assert module.scales.dtype == torch.float32 and torch.equal(module(torch.float32), exact)
    for again in (model.to("cpu", torch.bfloat16), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again[0].weight.dtype == torch.bfloat16 and torch.equal(again[1](torch.float32), exact)
    assert module.to_empty(device="meta").scales.device.type == "meta"


@pytest.mark.parametrize("shape", [(151936, 2048), (128, 1536, 2048), (7, 40, 24), (1000, 96)])
def test_pieces_are_whole_blocks_of_bounded_size(shape: tuple[int, ...]) -> None:
    weight = NF4Weight(torch.empty(shape, device="meta"))
    pieces, row = list(weight.pieces()), math.prod(shape[1:])
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == shape[0]
    assert all(piece.start * row % nf4.BLOCK == 0 for piece in pieces)
    largest = max((piece.stop - piece.start) * row for piece in pieces)
    assert largest <= 2**24, "64 MB in float32, of a weight of any size"


@pytest.mark.skipif("BITSANDBYTES_PYTHON" not in os.environ, reason="BITSANDBYTES_PYTHON names no environment with it")
def test_bits_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    values = torch.randn(64, 128)
    torch.save(values, tmp_path / "values.pt")
    script = (
        "import sys, torch, bitsandbytes.functional as F; v = torch.load(sys.argv[1]);"
        "q, s = F.quantize_4bit(v, blocksize=64, quant_type='nf4'); torch.save((q, s.absmax), sys.argv[2])"
    )
    ask = [os.environ["BITSANDBYTES_PYTHON"], "-c", script, tmp_path / "values.pt", tmp_path / "theirs.pt"]
    subprocess.run(ask, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    codes, scales = torch.load(tmp_path / "theirs.pt")
    ours = quantize(values.flatten())
    assert torch.equal(codes.flatten(), ours[0]) and torch.equal(scales, ours[1]), sys.version


def _model(quantized: bool) -> CausalLM:
    keys = {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 24, "norm_type": "rmsnorm",
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True},
        "ffn_config": {"ffn_type": "moe", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}, "moe_num_experts": 4,
                       "moe_top_k": 2, "shared_expert": True},
        "init_config": {"name": "normal_", "init_std": 0.2},
        "lora": {"rank": 3, "alpha": 6.0, "target_modules": ["wqkv", "experts.w1"],
                 "quantize": "nf4" if quantized else None},
    }  # fmt: skip
    model = check(CausalLMConfig, keys).build()
    init_weights(model, 3)
    with torch.no_grad():
        for _, _, b in adapters(model):
            b.fill_(0.1)
    return model


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_quantized_model_is_the_model_of_its_weights(recompute: str) -> None:
    plain, quantized, tokens = _model(False), _model(True), torch.randint(0, 61, (2, 12))
    weights = dict(plain.named_parameters())
    found = dict(frozen_weights(quantized))
    attention, shared = (f"attn.{leaf}.weight" for leaf in ("wqkv", "out_proj")), ("w1.weight", "w2.weight")
    leaves = [*attention, "ffn.experts.w1", "ffn.experts.w2", *(f"ffn.shared_expert.{leaf}" for leaf in shared)]
    assert found.keys() == {f"blocks.{i}.{leaf}" for i in range(2) for leaf in leaves}
    assert not found.keys() & quantized.state_dict().keys()
    with torch.no_grad():
        for name, frozen in found.items():
            frozen.quantize_(weights[name])
            assert (frozen(torch.float32) - weights[name]).abs().max() > 0
            weights[name].copy_(frozen(torch.float32))
    recompute_blocks(quantized.blocks, recompute, None, in_graph=False)
    for model in (plain, quantized):
        model(tokens).logits.square().mean().backward()
    assert torch.equal(plain(tokens).logits, quantized(tokens).logits)
    theirs, ours = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, quantized))
    merged = [dict(folded(model)) for model in (plain, quantized)]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(value, merged[1][name]) for name, value in merged[0].items())
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
