"""Lion: the formula, sharded parameters, and what a checkpoint brings back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llmfoundry.config import check
from llmfoundry.train.lion import DecoupledLionWConfig
from llmfoundry.train.optim import OptimizerConfig, set_learning_rate


def build(model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    return check(OptimizerConfig, {"name": "decoupled_lionw", **settings}).build(model)


def with_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("betas", "decay"), [((0.9, 0.99), 0.0), ((0.9, 0.95), 0.1), ((0.0, 0.5), 0.01)])
def test_each_step_is_the_formula(betas: tuple[float, float], decay: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = build(model, lr=0.01, betas=list(betas), weight_decay=decay)
    want = {name: p.detach().double() for name, p in model.named_parameters()}
    moment = {name: torch.zeros_like(p) for name, p in want.items()}
    for step in range(4):
        lr = set_learning_rate(optimizer, 0.5 if step else 1.0)
        with_gradients(model, step)
        optimizer.step()
        for name, parameter in model.named_parameters():
            grad, m = parameter.grad.double(), moment[name]
            shrink = 1 - lr / 0.01 * (decay if name == "weight" else 0.0)  # biases are not decayed
            want[name] = want[name] * shrink - lr * torch.sign(betas[0] * m + (1 - betas[0]) * grad)
            moment[name] = betas[1] * m + (1 - betas[1]) * grad
            torch.testing.assert_close(parameter.detach().double(), want[name], rtol=1e-6, atol=1e-7)


def test_defaults_are_llm_foundrys() -> None:
    config = check(OptimizerConfig, {"name": "decoupled_lionw"})
    assert isinstance(config, DecoupledLionWConfig)
    assert (config.lr, config.betas, config.weight_decay) == (1e-4, [0.9, 0.99], 0.0)


def test_a_restored_state_continues_bitwise() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = build(model, lr=0.01, weight_decay=0.1)
    with_gradients(model, 1)
    optimizer.step()
    other = copy.deepcopy(model)
    resumed = build(other, lr=0.01, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (other, resumed)):
        with_gradients(one, 2)
        its.step()
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)


def test_a_sharded_parameter_is_updated_in_its_own_part(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = nn.Linear(3, 4, bias=False)
        sharded = nn.Linear(3, 4, bias=False)
        sharded.weight = nn.Parameter(distribute_tensor(plain.weight.detach().clone(), mesh, [Shard(0)]))
        grad = torch.randn(4, 3)
        plain.weight.grad, sharded.weight.grad = grad, distribute_tensor(grad, mesh, [Shard(0)])
        for model in (plain, sharded):
            optimizer = build(model, lr=0.01)
            optimizer.step()
        assert isinstance(optimizer.state[sharded.weight]["exp_avg"], DTensor)
        assert torch.equal(sharded.weight.full_tensor(), plain.weight)
    finally:
        dist.destroy_process_group()
