"""Muon: torch's formula, which matrices are orthogonal by themselves, groups, casts of the state, a step on two ranks.

The gradients' and curves' tests of tests/parallel hold it to one process on every mesh.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from llmfoundry.config import ConfigError, check
from llmfoundry.kernels.muon import orthogonalize
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM
from llmfoundry.parallel.owners import rows_of_ranks
from llmfoundry.train import muon
from llmfoundry.train.muon import MuonConfig
from llmfoundry.train.optim import OptimizerConfig, clipping, update
from tests.train.test_step import config

ROUTER = r"ffn\.router\.weight"


def small(**ffn: object) -> CausalLM:
    model = config(**ffn).build()
    init_weights(model, seed=1)
    return model


def build(model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    return check(OptimizerConfig, {"name": "muon", "lr": 0.02} | settings).build(model)


def with_gradients(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def by_muon(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[each] for group in optimizer.param_groups if group["muon"] for each in group["params"]}


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_the_step_is_that_of_torch(shape: tuple[int, int], nesterov: bool, adjust_lr_fn: str) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(*shape, bias=False), nn.Linear(*shape, bias=False)
    theirs.load_state_dict(ours.state_dict())
    settings = {"momentum": 0.9, "nesterov": nesterov, "ns_steps": 4, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn}
    one = build(ours, ns_dtype="fp32", **settings)
    other = torch.optim.Muon(theirs.parameters(), lr=0.02, **settings)  # type: ignore[arg-type]
    start = ours.weight.detach().clone()
    for step in range(3):
        for model, optimizer in ((ours, one), (theirs, other)):
            with_gradients(model, step)
            optimizer.step()
    # Products of torch's are in bf16.
    moved = (theirs.weight - start).detach()
    torch.testing.assert_close((ours.weight - start).detach(), moved, rtol=0, atol=float(moved.abs().max()) / 32)
    state = other.state[theirs.weight]["momentum_buffer"]
    torch.testing.assert_close(one.state[ours.weight]["momentum_buffer"], state)


def test_matrices_of_blocks_are_muons_and_the_rest_is_adamws() -> None:
    model = small(shared_expert=True, shared_expert_gate=True)
    optimizer = build(model, lr=0.02, adamw_lr=0.003)
    found = by_muon(model, optimizer)
    assert {name.split("blocks.0.")[1] for name in found if name.startswith("blocks.0.")} == {
        "attn.wqkv.weight", "attn.out_proj.weight", "ffn.experts.w1", "ffn.experts.w2",
        "ffn.shared_expert.w1.weight", "ffn.shared_expert.w2.weight",
    }  # fmt: skip
    assert all(name.startswith("blocks.") for name in found)
    assert {(group["muon"], group["lr"]) for group in optimizer.param_groups} == {(True, 0.02), (False, 0.003)}
    assert optimizer.param_groups[0]["lr"] == 0.02, "what a run shows"
    with_gradients(model)
    optimizer.step()
    keys = {name: set(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    assert all(keys[name] == {"step", "momentum_buffer"} for name in found)
    assert all(keys[name] == {"step", "exp_avg", "exp_avg_sq"} for name in keys.keys() - found)


def test_a_group_chooses_the_algorithm_and_the_rate() -> None:
    model = small()
    groups = [{"param_str_match": ROUTER, "algorithm": "muon", "lr": 0.5},
              {"param_str_match": "attn", "algorithm": "adamw"}]  # fmt: skip
    optimizer = build(model, param_groups=groups, adamw_lr=0.003)
    found = by_muon(model, optimizer)
    assert any("router" in name for name in found) and not any("attn" in name for name in found)
    assert {(group["number"], group["lr"]) for group in optimizer.param_groups} == {
        (0, 0.02), (0, 0.003), (1, 0.5), (2, 0.02)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"param_groups": [{"param_str_match": "norm", "algorithm": "muon"}]}, "param_groups.0.algorithm: muon is for"),
     ({"name": "adamw", "param_groups": [{"param_str_match": "attn", "algorithm": "muon"}]}, "is for name: muon"),
     ({"adjust_lr_fn": "moonlight"}, "optimizer.adjust_lr_fn"), ({"momentum": 1.0}, "optimizer.momentum")],
)  # fmt: skip
def test_mistakes_are_told(settings: dict[str, object], said: str) -> None:
    from tests.train.test_optim import Block

    with pytest.raises(ConfigError) as error:
        check(Block, {"optimizer": {"name": "muon", "lr": 0.1} | settings}).optimizer.build(small())
    assert said in str(error.value)


def changes(model: CausalLM, **settings: object) -> dict[str, Tensor]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with_gradients(model)
    build(model, lr=1.0, weight_decay=0.0, momentum=0.0, **settings).step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def test_each_expert_and_each_of_stacked_matrices_is_orthogonal_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_AT_ONCE", 1000)  # so that experts are several batches
    model = small()
    change, grads = changes(model), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def direction(grad: Tensor) -> Tensor:
        scale = 0.2 * math.sqrt(max(grad.shape))
        return orthogonalize(grad[None].clone(), 5)[0] * scale

    name = "blocks.1.ffn.experts.w1"
    half = grads[name].shape[1] // 2
    for expert in range(len(grads[name])):
        for rows in (slice(half), slice(half, None)):
            torch.testing.assert_close(change[name][expert, rows], direction(grads[name][expert, rows]), msg=str(rows))
    name = "blocks.0.attn.wqkv.weight"
    third = grads[name].shape[0] // 3
    for i in range(3):
        rows = slice(i * third, (i + 1) * third)
        torch.testing.assert_close(change[name][rows], direction(grads[name][rows]))


def test_an_update_is_as_large_as_adamws() -> None:
    """By match_rms_adamw: 0.2 to 0.4 of the learning rate is what AdamW's steps have."""
    for name, change in changes(small()).items():
        if name.endswith((".w1", ".w2", "wqkv.weight")):
            assert 0.1 < change.square().mean().sqrt() < 0.3, name


def test_a_step_that_is_skipped_changes_nothing() -> None:
    model = small()
    optimizer = build(model)
    with_gradients(model)
    update(optimizer, clipping(model.parameters(), 1.0))
    kept = [each.detach().clone() for each in model.parameters()]
    state = copy.deepcopy([optimizer.state[each] for each in model.parameters()])
    with_gradients(model, 4)
    grad = model.get_parameter("blocks.0.ffn.experts.w1").grad
    assert grad is not None
    grad[0, 0, 0] = float("nan")
    update(optimizer, clipping(model.parameters(), 1.0))
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    for before, parameter in zip(state, model.parameters(), strict=True):
        assert all(torch.equal(value, optimizer.state[parameter][key]) for key, value in before.items())


def test_flops_and_state_are_those_of_a_plan() -> None:
    model = small()
    muon_config = check(OptimizerConfig, {"name": "muon", "lr": 0.02})
    assert isinstance(muon_config, MuonConfig) and muon_config.state_bytes == 4
    alone = sum(
        len(p) * (2 if name.endswith("w1") else 1) * (6 * s * s * c + 14 * s**3)
        for name, p in model.named_parameters()
        if ".experts.w" in name
        for s, c in [sorted((p.shape[1] // (2 if name.endswith("w1") else 1), p.shape[2]))]
    )
    attention = 4 * 20 * 16**3  # queries, keys, values and output of width 16
    assert muon_config.update_flops(model.config) == alone + 2 * attention
    assert check(OptimizerConfig, {"name": "adamw", "lr": 0.02}).update_flops(model.config) == 0


def test_rows_of_ranks_are_those_of_chunk() -> None:
    for rows, ranks in ((7, 2), (5, 4), (8, 4), (3, 4)):
        sizes = [len(part) for part in torch.arange(rows).chunk(ranks)]
        assert rows_of_ranks(rows, ranks, 0, rows) == sizes + [0] * (ranks - len(sizes))
    assert rows_of_ranks(12, 3, 2, 9) == [2, 4, 1]
