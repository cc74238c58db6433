"""Mixed precision in one process: a lean step changes no bit, and copies of weights are never stale."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmfoundry.config import ConfigError
from llmfoundry.moe.balance import Balance
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh
from llmfoundry.parallel.single import copy_to_write
from llmfoundry.train.lion import DecoupledLionWConfig
from llmfoundry.train.muon import MuonConfig
from llmfoundry.train.optim import AdamWConfig, OptimizerConfig, clipping
from llmfoundry.train.step import train_step

ADAMW = AdamWConfig(name="adamw", lr=1e-2)
BF16_STATES = AdamWConfig(name="adamw", lr=1e-2, state_dtype="bf16")
INT8_STATES = AdamWConfig(name="adamw", lr=1e-2, state_dtype="int8")
MUON = MuonConfig(name="muon", lr=1e-2)
LION = DecoupledLionWConfig(name="decoupled_lionw", lr=1e-3, state_dtype="bf16")


class Run:
    def __init__(self, optimizer: OptimizerConfig, microbatch: int = tiny.ROWS, **parallel: object) -> None:
        self.config = tiny.model_config(tiny.Case("single", tied=True))
        parallel_config = ParallelConfig(**parallel)
        mesh = build_mesh(parallel_config, "cpu", 8)
        with torch.device("meta"):
            model = self.config.build()
        self.model = materialize(parallelize(model, mesh, parallel_config, "amp_bf16"), parallel_config, tiny.SEED)
        self.optimizer: Optimizer = optimizer.build(self.model)
        self.microbatch, self.gradients = microbatch, list[torch.dtype]()
        self.optimizer.register_step_pre_hook(lambda *_: self._look())

    def _look(self) -> None:
        self.gradients = [p.grad.dtype for p in self.model.parameters() if p.grad is not None]

    def step(self, times: int = 3) -> list[float]:
        losses = []
        for step in range(times):
            done = train_step(
                self.model, self.optimizer, tiny.batch(step), microbatch_rows=self.microbatch, max_grad_norm=0.5,
                balance=Balance.of(self.config), step=step,
            )  # fmt: skip
            losses.append(float(done.ce))
        return losses

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("optimizer", [ADAMW, BF16_STATES, INT8_STATES, LION, MUON])
def test_a_lean_step_changes_no_bit(optimizer: OptimizerConfig, recompute: str) -> None:
    lean, plain = Run(optimizer, recompute=recompute), Run(optimizer, recompute=recompute)
    plain.optimizer.reads_any_gradient = False  # type: ignore[attr-defined]
    assert lean.step() == plain.step()
    assert all(torch.equal(a, b) for a, b in zip(lean.weights(), plain.weights(), strict=True))
    assert set(lean.gradients) == {torch.bfloat16} and set(plain.gradients) == {torch.float32}


def test_gradients_of_several_microbatches_are_summed_in_float32() -> None:
    run = Run(ADAMW, microbatch=tiny.ROWS // 2)
    run.step(1)
    assert set(run.gradients) == {torch.float32}
    assert all(copy_to_write(parameter) is None for parameter in run.model.parameters())


def test_an_optimizer_that_reads_gradients_of_its_weights_alone_gets_them() -> None:
    run = Run(ADAMW)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-3)
    run.optimizer.register_step_pre_hook(lambda *_: run._look())
    run.step(1)
    assert set(run.gradients) == {torch.float32}


def test_sums_in_bf16_are_near_those_in_float32() -> None:
    exact, rounded = Run(ADAMW, microbatch=1), Run(ADAMW, microbatch=1, sum_gradients_in="bf16")
    found: list[list[Tensor]] = []
    for run in (exact, rounded):
        hook = lambda *_, run=run: found.append([p.grad.float().clone() for p in run.model.parameters()])  # noqa: E731
        run.optimizer.register_step_pre_hook(hook)
        run.step(1)
    assert set(rounded.gradients) == {torch.bfloat16}
    error = sum(float((a - b).square().sum()) for a, b in zip(*found, strict=True)) ** 0.5
    norm = sum(float(a.square().sum()) for a in found[0]) ** 0.5
    # Each of 7 sums is rounded by at most 1/128 of it: by chance, 2 to 3 times 1/256 of it in all.
    assert 0 < error < norm / 64


def test_sums_in_bf16_need_a_single_process_in_mixed_precision() -> None:
    config = ParallelConfig(sum_gradients_in="bf16")
    mesh = build_mesh(config, "cpu", 8)
    with pytest.raises(ConfigError, match="sum_gradients_in"), torch.device("meta"):
        parallelize(tiny.model_config(tiny.Case("fp32")).build(), mesh, config, "fp32")


def test_copies_follow_weights_that_others_change() -> None:
    run = Run(ADAMW)
    run.step(1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(1.5)
    run.model.eval()(tiny.batch(0).tokens)
    for parameter in run.model.parameters():
        assert torch.equal(_copy(parameter), parameter.bfloat16())


@pytest.mark.parametrize("optimizer", [BF16_STATES, INT8_STATES, MUON])
def test_the_update_writes_the_copies(optimizer: OptimizerConfig) -> None:
    run = Run(optimizer)
    run.step(2)
    for parameter in run.model.parameters():
        assert torch.equal(_copy(parameter), parameter.bfloat16())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_norm_of_gradients_in_bf16_is_exact(device: str) -> None:
    """A sum of 2**20 squares of 1 in bfloat16 would stop at 256."""
    parameter = nn.Parameter(torch.zeros(2**20, device=device))
    parameter.grad_dtype = torch.bfloat16
    parameter.grad = torch.full_like(parameter, 1.0078125, dtype=torch.bfloat16)  # no power of two
    assert float(clipping([parameter], 1.0).norm) == pytest.approx(1.0078125 * 1024, rel=1e-6)


def _copy(parameter: Tensor) -> Tensor:
    copy = copy_to_write(parameter)
    assert copy is not None
    return copy
