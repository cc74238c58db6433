"""DPO on two ranks, with adapters and with a reference of its own: the same loss and gradients as in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from test_adapters_on_every_mesh import _config as with_adapters
from tiny import Case
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llmfoundry import runtime
from llmfoundry.data.loader import Batch
from llmfoundry.layers.lora import is_adapter
from llmfoundry.model.transformer import CausalLM
from llmfoundry.moe.balance import Balance
from llmfoundry.train.loss import DPO
from llmfoundry.train.step import train_step

pytestmark = pytest.mark.dist

CASES = [
    Case("adapters, shard 2", microbatch=2),
    Case("adapters, shard 2, expert 2, full", {"expert": 2, "recompute": "full"}, microbatch=1),
    Case("reference, shard 2", microbatch=3),
    Case("reference, shard 2, expert 2", {"expert": 2}, microbatch=2),
]
# Rank 1 runs out of memory in the reference, before the model has run at all; then the step is taken again.
FULL = Case("reference, shard 2, expert 2, left once", {"expert": 2}, microbatch=2)
ALL = [*CASES, FULL] if hasattr(FSDPModule, "reset_iter_state") else CASES  # before torch 2.13 no step could be left


def _pairs() -> Batch:
    """This rank's pairs: a row and one of another stride."""
    one, other = tiny.batch(0), tiny.batch(1)
    return one._replace(
        tokens=torch.cat([one.tokens, other.tokens], 1), labels=torch.cat([one.labels, other.labels], 1)
    )


def _learn(case: Case, as_case: str) -> dict[str, Tensor]:
    """Gradients and results of one step of a model that already differs from its reference."""
    lora = as_case.startswith("adapters")
    with pytest.MonkeyPatch.context() as patch:
        if lora:
            patch.setattr(tiny, "model_config", with_adapters)
        model = tiny.build(case, torch.float64)
        reference = None if lora else tiny.build(case, torch.float64).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B") or not lora:
                parameter.mul_(0.9).add_(0.05 if lora else 0.0)
    optimizer, found = tiny.new_optimizer(model, 1e-2), {}

    def keep(*_: object) -> None:
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (is_adapter(name) or not lora), name
            if parameter.grad is not None:
                found[name] = tiny.full(parameter.grad)

    optimizer.register_step_pre_hook(keep)
    step = partial(
        train_step, model, optimizer, _pairs(), microbatch_rows=case.microbatch, max_grad_norm=None,
        balance=Balance.of(model.config), noise_seed=tiny.SEED, objective=DPO(0.3, reference), together=True,
    )  # fmt: skip
    if case is FULL:
        assert reference is not None
        _leave_once(reference, step)
    result = step()
    return found | {"total": result.total.double(), "metrics": result.metrics.double(), "ce": result.ce.double()}


def _leave_once(reference: CausalLM, step: Callable[[], object]) -> None:
    """A step that one rank cannot take, for want of memory in the last block of the reference."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = reference.blocks[-1].register_forward_pre_hook(full) if torch.distributed.get_rank() == 1 else None
    with pytest.raises(runtime.OutOfMemory):
        step()
    if hook is not None:
        hook.remove()


def job(folder: Path) -> None:
    """What each process does; the first one writes what they found."""
    for case in ALL:
        found = _learn(case, case.name)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{case.name}.pt")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    run_ranks([2], job, folder)
    return folder


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_preferences_are_learned_the_same_on_every_mesh(case: Case, spread: Path) -> None:
    true, ours = _learn(Case("alone"), case.name), torch.load(spread / f"{case.name}.pt", weights_only=True)
    assert true.keys() == ours.keys() and true["metrics"].abs().max() > 0.01
    for name, value in true.items():
        tolerance = 1e-5 if name in ("total", "metrics", "ce") else 1e-10  # those are kept in float32
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
