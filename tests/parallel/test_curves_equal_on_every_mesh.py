"""The same curve however a run is spread, cut into microbatches and recomputed: 20 steps in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from tiny import Case
from torch import Tensor

pytestmark = pytest.mark.dist

STEPS, CLIP, LR = 20, 1.0, 5e-3
ALONE = [
    Case("alone"),
    Case("alone, microbatch 1, full", {"recompute": "full"}, microbatch=1),
    Case("alone, microbatch 2, selective", {"recompute": "selective"}, microbatch=2),
    Case("alone, microbatch 4", microbatch=4),
]
SPREAD = {
    2: [
        Case("shard 2, microbatch 2, full", {"recompute": "full"}, microbatch=2),
        Case("shard 2, expert 2, microbatch 4, selective", {"expert": 2, "recompute": "selective"}, microbatch=4),
        Case("replicate 2, microbatch 1", {"replicate": 2}, microbatch=1),
    ],
    4: [
        Case("shard 4, expert 2, microbatch 1", {"expert": 2}, microbatch=1),
        Case("shard 4, expert 4, full", {"expert": 4, "recompute": "full"}),
        Case("replicate 2, shard 2, expert 2, selective", {"replicate": 2, "expert": 2, "recompute": "selective"}),
    ],
}
CASES = [*ALONE[1:], *SPREAD[2], *SPREAD[4]]


def curve(case: Case) -> dict[str, Tensor]:
    """First weights, and the loss with and without balance losses and the gradient norm of each step."""
    model = tiny.build(case._replace(n_dense=0), torch.float32)
    found = {f"init/{name}": value for name, value in tiny.weights(model).items()}
    results = tiny.train(model, case, STEPS, CLIP, LR)
    for name in ("ce", "total", "grad_norm"):
        found[name] = torch.stack([getattr(result, name) for result in results]).double()
    return found


def job(folder: Path) -> None:
    """What each process does; the first one writes what they found."""
    for case in SPREAD[torch.distributed.get_world_size()]:
        found = curve(case)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{case.name}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("curves")
    run_ranks([4, 2], job, folder)
    spread = {path.stem: torch.load(path, weights_only=True) for path in folder.iterdir()}
    return spread | {case.name: curve(case) for case in ALONE}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_curve_equals_that_of_one_process(case: Case, found: dict[str, dict[str, Tensor]]) -> None:
    true, ours = found["alone"], found[case.name]
    assert true["ce"][-1] < 0.8 * true["ce"][0], "there has to be a curve"
    for name, value in true.items():
        if name.startswith("init/"):
            assert torch.equal(ours[name], value), name
        else:
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=0.0, msg=lambda m, name=name: f"{name}: {m}")
