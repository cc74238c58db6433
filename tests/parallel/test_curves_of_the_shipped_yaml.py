"""The first steps of `yamls/moe.yaml` with its own keys: one process and two ranks give one curve and equal weights.

Only the duration is changed, to 5,000 steps, which sets the warm-up. In a run of 20 steps the learning rate would reach
its full 4e-3 in the third step. The gradient norm then jumps tenfold, and a difference in the last digit grows to a per
cent of the loss within ten steps, also in one process whose first weights differ by one unit in the last place.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks

import llmfoundry.callbacks  # noqa: F401  registers what the YAML names
from llmfoundry import runtime
from llmfoundry.config import check
from llmfoundry.settings import load_yaml
from llmfoundry.train.build import build
from llmfoundry.train.config import RunConfig

pytestmark = pytest.mark.dist

YAML = Path(__file__).resolve().parents[2] / "yamls" / "moe.yaml"
CURVES = ("loss/train/ce", "loss/train/total", "grad_norm")
# Steps and overrides of each run; the microbatches of the second are of another size than the default's.
RUNS = {"as shipped": (10, []), "microbatches of 1 row": (3, ["device_train_microbatch_size=1"])}


def train(folder: Path, overrides: list[str], names: dict[str, int]) -> None:
    """One run: under each name, the losses and gradient norms of so many steps, and the weights after them."""
    options = ["max_duration=5000ba", f"save_folder={folder / 'run'}", *overrides]
    trainer = build(check(RunConfig, load_yaml(YAML, options)))
    taken: list[dict[str, float]] = []
    for name, steps in sorted(names.items(), key=lambda item: item[1]):
        taken += [trainer.take_step() for _ in range(steps - len(taken))]
        found = {key: torch.tensor([step[key] for step in taken], dtype=torch.float64) for key in CURVES}
        found |= {f"weight/{key}": value for key, value in tiny.weights(trainer.model).items()}
        if runtime.is_rank0():
            torch.save(found, folder / f"{name}.pt")


def job(folder: Path) -> None:
    for name, (steps, overrides) in RUNS.items():
        train(folder, overrides, {name: steps})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, then those of two ranks in `ranks`."""
    folder = tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMFOUNDRY_CACHE", str(folder / "cache"))
        train(folder, [], {name: steps for name, (steps, _) in RUNS.items()})
        (folder / "ranks").mkdir()
        run_ranks([2], job, folder / "ranks")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_follow_the_curve_of_one_process(name: str, folder: Path) -> None:
    true, found = (torch.load(each / f"{name}.pt", weights_only=True) for each in (folder, folder / "ranks"))
    assert found.keys() == true.keys()
    assert (true["loss/train/total"] > true["loss/train/ce"] + 0.009).all(), "there has to be a balance loss"
    for key, value in true.items():
        # float32 sums in another order, and what ten updates make of them.
        tolerance = {"rtol": 0.0, "atol": 1e-5} if key.startswith("weight/") else {"rtol": 1e-5, "atol": 0.0}
        torch.testing.assert_close(found[key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")
