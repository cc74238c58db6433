"""The same curve however a run is spread, cut into microbatches and recomputed: 20 steps in float32.

Each run saves in the middle. Each of these checkpoints continues in one process, which reads all of it, and those of
one kind each in other layouts, which read their parts of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from tiny import Case
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.checkpoint.checkpointer import Checkpointer, CheckpointState
from llmfoundry.model.transformer import CausalLM

pytestmark = pytest.mark.dist

STEPS, MIDDLE, CONTINUED, CLIP, LR = 20, 10, 3, 1.0, 5e-3
# By the number of processes.
MUON = {
    1: Case("muon, alone", optimizer="muon"),
    2: Case("muon, shard 2, expert 2", {"expert": 2}, optimizer="muon"),
    4: Case("muon, replicate 2, shard 2", {"replicate": 2}, optimizer="muon"),
}
LAYOUTS = {
    1: [Case("alone")],
    2: [
        Case("shard 2, microbatch 2, full", {"recompute": "full"}, microbatch=2),
        Case("shard 2, expert 2, microbatch 4, selective", {"expert": 2, "recompute": "selective"}, microbatch=4),
        Case("replicate 2, microbatch 1, graphs kept", {"replicate": 2}, microbatch=1, accumulation="keep"),
    ],
    4: [
        Case("shard 4, expert 2, microbatch 1", {"expert": 2}, microbatch=1),
        Case("shard 4, expert 4, full", {"expert": 4, "recompute": "full"}),
        Case("replicate 2, shard 2, expert 2, selective", {"replicate": 2, "expert": 2, "recompute": "selective"}),
    ],
}
EVERY = [case.name for cases in LAYOUTS.values() for case in cases]
# Where checkpoints continue, and which: every one in one process, and in two layouts one of each other kind.
CONTINUING = {
    1: (LAYOUTS[1][0], EVERY),
    2: (LAYOUTS[2][1], [LAYOUTS[1][0].name, LAYOUTS[4][2].name]),  # shards, experts divided
    4: (LAYOUTS[4][2], [LAYOUTS[1][0].name, LAYOUTS[2][0].name, LAYOUTS[4][1].name]),  # with replicas
}
ALONE_OTHERWISE = [
    Case("alone, microbatch 1, full", {"recompute": "full"}, microbatch=1),
    Case("alone, microbatch 4, selective", {"recompute": "selective"}, microbatch=4),
]
Curve = dict[str, Tensor]


def start(case: Case) -> tuple[CausalLM, Optimizer]:
    model = tiny.build(case._replace(n_dense=0), torch.float32)
    return model, tiny.new_optimizer(model, LR, case.optimizer)


def curve(case: Case, model: CausalLM, optimizer: Optimizer, steps: range) -> Curve:
    """The loss with and without balance losses, and the gradient norm, of each step."""
    results = tiny.train(model, case, steps, CLIP, optimizer=optimizer)
    return {
        name: torch.stack([getattr(result, name) for result in results]).double()
        for name in ("ce", "total", "grad_norm")
    }


def whole_run(case: Case, folder: Path) -> Curve:
    """All steps from the first weights, saving in the middle."""
    model, optimizer = start(case)
    found = {f"init/{name}": value for name, value in tiny.weights(model).items()}
    first = curve(case, model, optimizer, range(MIDDLE))
    Checkpointer(folder / case.name).save(CheckpointState(step=MIDDLE, model=model, optimizer=optimizer))
    second = curve(case, model, optimizer, range(MIDDLE, STEPS))
    return found | {name: torch.cat([first[name], second[name]]) for name in first}


def continued_run(case: Case, saved: Path) -> Curve:
    """Some steps from the checkpoint of another layout."""
    model, optimizer = start(case)
    Checkpointer(saved).load(saved, CheckpointState(step=0, model=model, optimizer=optimizer))
    return curve(case, model, optimizer, range(MIDDLE, MIDDLE + CONTINUED))


def train_all(folder: Path) -> None:
    """What each process does first; rank 0 writes what all found."""
    for case in (*LAYOUTS[runtime.world_size()], MUON[runtime.world_size()]):
        keep(whole_run(case, folder), folder / f"{case.name}.pt")


def continue_all(folder: Path) -> None:
    """What each process does then."""
    case, saved = CONTINUING[runtime.world_size()]
    for name in saved:
        keep(continued_run(case, folder / name), folder / f"{name} to {case.name}.pt")
    case, others = MUON[runtime.world_size()], {n: each.name for n, each in MUON.items() if n != runtime.world_size()}
    name = others[max(others)]  # of another kind: 4 processes continue from 2, and 2 and 1 from 4
    keep(continued_run(case, folder / name), folder / f"{name} to {case.name}.pt")


def keep(found: Curve, path: Path) -> None:
    if runtime.is_rank0():
        torch.save(found, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("curves")
    for job in (train_all, continue_all):
        run_ranks([4, 2], job, folder)
        job(folder)
    yield folder


def assert_same_curve(ours: Curve, true: Curve, steps: slice) -> None:
    for name in ("ce", "total", "grad_norm"):
        # 1e-5 of a float32 sum: another order of summation, and what twenty updates make of it.
        torch.testing.assert_close(
            ours[name], true[name][steps], rtol=1e-5, atol=0.0, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_start(ours: Curve, true: Curve) -> None:
    initial = [name for name in true if name.startswith("init/")]
    assert initial and all(torch.equal(ours[name], true[name]) for name in initial)


@pytest.mark.parametrize("name", EVERY[1:])
def test_a_run_spread_is_that_of_one_process(name: str, folder: Path) -> None:
    true, ours = (torch.load(folder / f"{each}.pt", weights_only=True) for each in ("alone", name))
    assert true["ce"][-1] < 0.8 * true["ce"][0], "there has to be a curve"
    assert_same_start(ours, true)
    assert_same_curve(ours, true, slice(None))


def test_muon_on_every_mesh_is_that_of_one_process(folder: Path) -> None:
    true = torch.load(folder / "muon, alone.pt", weights_only=True)
    assert true["ce"][-1] < 0.9 * true["ce"][0], "there has to be a curve"
    for n in (2, 4):
        assert_same_curve(torch.load(folder / f"{MUON[n].name}.pt", weights_only=True), true, slice(None))
    for n, before in ((1, 4), (2, 4), (4, 2)):
        ours = torch.load(folder / f"{MUON[before].name} to {MUON[n].name}.pt", weights_only=True)
        assert_same_curve(ours, true, slice(MIDDLE, MIDDLE + CONTINUED))


@pytest.mark.parametrize("case", ALONE_OTHERWISE, ids=[case.name for case in ALONE_OTHERWISE])
def test_microbatches_and_recompute_change_nothing(case: Case, folder: Path, tmp_path: Path) -> None:
    true, ours = torch.load(folder / "alone.pt", weights_only=True), whole_run(case, tmp_path)
    assert_same_start(ours, true)
    assert_same_curve(ours, true, slice(None))


@pytest.mark.parametrize(("saved_on", "to"), [(name, to.name) for to, saved in CONTINUING.values() for name in saved])
def test_a_checkpoint_of_every_mesh_continues_on_another(saved_on: str, to: str, folder: Path) -> None:
    true = torch.load(folder / "alone.pt", weights_only=True)
    ours = torch.load(folder / f"{saved_on} to {to}.pt", weights_only=True)
    assert_same_curve(ours, true, slice(MIDDLE, MIDDLE + CONTINUED))
