"""The test that matters most: every gradient of a float64 mixture is the same however it is spread.

OLMo-core once had expert gradients that were `expert` times too big: no loss showed it. Here all four-process cases
run in one start of the processes; the one-process truth is computed without any process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from shared_memory import PeersOnCPU
from tiny import Case
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llmfoundry.parallel import direct

pytestmark = pytest.mark.dist

STEPS, CLIP = 2, 0.5
ALONE = [Case("8 experts"), Case("6 experts", n_experts=6), Case("2 experts", n_experts=2), Case("tied", tied=True),
         Case("shared keys", shared_kv=True), Case("muon", optimizer="muon"),
         Case("muon, 2 experts", n_experts=2, optimizer="muon"),
         Case("muon, 6 experts", n_experts=6, optimizer="muon"),
         *(Case("bf16_sr", optimizer=name, state=state, half=True)
           for name, state in (("adamw", "fp32"), ("adamw", "bf16"), ("adamw", "int8"), ("decoupled_lionw", "bf16"),
                               ("muon", "bf16"))),
         *(Case("split", optimizer=name, state=state, half=True, split=True)
           for name, state in (("adamw", "fp32"), ("adamw", "int8"), ("decoupled_lionw", "fp32"), ("muon", "fp32"))),
         ]  # fmt: skip
Alone = dict[tuple[object, ...], dict[str, Tensor]]
CASES = [
    Case("shard 4"),
    Case("shard 4, expert 4, gathered", {"expert": 4, "exchange_tokens": "gather"}),
    Case("6 experts on 4 ranks", n_experts=6),
    Case("3 experts each on 2 ranks", {"expert": 2}, n_experts=6),
    Case("1 expert each on 2 ranks", {"expert": 2}, n_experts=2),
    Case("accumulation 2", {"replicate": 2, "expert": 2}, microbatch=1),
    Case("accumulation 2, graphs kept", {"expert": 2}, microbatch=1, accumulation="keep"),
    Case("accumulation 2, graphs kept, full recompute", {"expert": 2, "recompute": "full"}, microbatch=1,
         accumulation="keep"),
    Case("accumulation 2, graphs kept, full recompute, sent", {"expert": 2, "recompute": "full",
         "exchange_tokens": "all_to_all"}, microbatch=1, accumulation="keep"),
    Case("accumulation 2, reduced each time", {"replicate": 2, "expert": 2, "reduce_once_a_step": False}, microbatch=1),
    Case("tied head, kept weights", {"expert": 2, "reshard_after_forward": False, "prefetch": 0}, tied=True),
    Case("selective recompute", {"expert": 4, "recompute": "selective", "prefetch": 2}),
    Case("shared keys", {"replicate": 2}, shared_kv=True),
    Case("shared keys, accumulation 2, full recompute", {"expert": 2, "recompute": "full"}, microbatch=1,
         shared_kv=True),
    Case("muon, shard 4", optimizer="muon"),
    Case("muon, shard 4, expert 4", {"expert": 4}, optimizer="muon"),
    Case("muon, replicate 2, shard 2, expert 2", {"replicate": 2, "expert": 2}, optimizer="muon"),
    Case("muon, 1 expert each on 2 ranks", {"expert": 2}, n_experts=2, optimizer="muon"),
    Case("muon, 6 experts on 4 ranks", n_experts=6, optimizer="muon"),
    Case("packed, shard 4", {"gather_experts": "packed"}),
    Case("packed, shard 4, expert 2, full recompute", {"gather_experts": "packed", "expert": 2, "recompute": "full"}),
    Case("packed, split, accumulation 2, reduced each time", {"gather_experts": "packed", "expert": 2,
         "reduce_once_a_step": False}, microbatch=1, half=True, split=True),
    Case("copies, shard 4"),
    Case("copies, shard 4, expert 2, full recompute", {"expert": 2, "recompute": "full"}),
    Case("copies, replicate 2, shard 2, prefetch 2", {"replicate": 2, "prefetch": 2}),
    Case("copies, accumulation 2, reduced each time", {"expert": 2, "reduce_once_a_step": False}, microbatch=1),
    Case("bf16_sr, shard 4, accumulation 2", microbatch=1, half=True),
    Case("bf16_sr, bf16 moments, accumulation 2, reduced each time", {"replicate": 2, "expert": 2,
         "reduce_once_a_step": False}, microbatch=1, state="bf16", half=True),
    Case("bf16_sr, int8 moments, expert 4, full recompute", {"expert": 4, "recompute": "full"}, state="int8",
         half=True),
    Case("bf16_sr, expert 4, accumulation 2", {"expert": 4}, microbatch=1, half=True),
    Case("bf16_sr, lion, bf16 momentum, expert 2", {"expert": 2}, optimizer="decoupled_lionw", state="bf16", half=True),
    Case("bf16_sr, muon, bf16 momentum, replicate 2, shard 2, expert 2", {"replicate": 2, "expert": 2},
         optimizer="muon", state="bf16", half=True),
    Case("split, shard 4, accumulation 2", microbatch=1, half=True, split=True),
    Case("split, int8 moments, expert 4, full recompute", {"expert": 4, "recompute": "full"}, state="int8", half=True,
         split=True),
    Case("split, host memory, accumulation 2, reduced each time", {"expert": 2, "cpu_offload": True,
         "reduce_once_a_step": False}, microbatch=1, half=True, split=True),
    Case("split, lion, expert 2", {"expert": 2}, optimizer="decoupled_lionw", half=True, split=True),
    Case("split, muon, replicate 2, shard 2, expert 2", {"replicate": 2, "expert": 2}, optimizer="muon", half=True,
         split=True),
]  # fmt: skip
WRONG = [Case("default divide factor, expert 2", {"expert": 2}), Case("default divide factor, expert 4", {"expert": 4})]


def trained(case: Case, steps: int = STEPS, clip: float | None = CLIP) -> dict[str, Tensor]:
    """The first step's gradients, the last weights, and what the steps reported; all of it whole."""
    model = tiny.build(case, torch.float64)
    found: dict[str, Tensor] = {}

    def keep(model: torch.nn.Module) -> None:
        if not found:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                found[f"grad/{name}"] = tiny.full(parameter.grad)

    results = tiny.train(model, case, steps, clip, watch=keep)
    found |= {f"weight/{name}": value for name, value in tiny.weights(model).items()}
    found["norm"] = torch.stack([result.grad_norm for result in results])
    found["load"] = torch.stack([result.router.load for result in results if result.router is not None])
    return found


def job(folder: Path) -> None:
    """What each of the four processes does; the first one writes what they found."""
    first = torch.distributed.get_rank() == 0
    for case in CASES:
        with pytest.MonkeyPatch.context() as patch:
            if copies := case.name.startswith("copies"):
                patch.setattr(direct, "Peers", PeersOnCPU)
            before = PeersOnCPU.allocated
            found = trained(case)
            assert (PeersOnCPU.allocated > before) == copies
        if first:
            torch.save(found, folder / f"{case.name}.pt")
    FSDPModule.set_gradient_divide_factor = lambda self, factor: None  # type: ignore[method-assign]
    direct.MOST_RANKS = 0  # FSDP sums the gradients of experts too
    for case in WRONG:
        found = trained(case, steps=1, clip=None)
        if first:
            torch.save(found, folder / f"{case.name}.pt")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gradients")
    run_ranks([4], job, folder)
    yield folder


@pytest.fixture(scope="module")
def alone() -> Alone:
    return {kind(case): trained(case) for case in ALONE}


def kind(case: Case) -> tuple[object, ...]:
    """What is trained, however it is spread."""
    return case.n_experts, case.tied, case.shared_kv, case.optimizer, case.state, case.half, case.split


def relative(found: Tensor, true: Tensor) -> float:
    return ((found - true).abs().max() / true.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_spread_equals_alone(case: Case, spread: Path, alone: Alone) -> None:
    true = alone[kind(case)]
    found = torch.load(spread / f"{case.name}.pt", weights_only=True)
    assert found.keys() == true.keys()
    assert true["norm"].min() > CLIP, "clipping has to do something"
    for name, value in true.items():
        what = name.split("/")[0]
        if what == "load" or (what == "weight" and case.half):  # of gradients so near, the same bits
            assert torch.equal(found[name], value), name
        else:  # float64 sums in another order; Adam divides by small numbers, Muon enlarges small singular values
            assert relative(found[name], value) < (1e-10 if what == "weight" else 1e-12), name


@pytest.mark.parametrize("case", WRONG, ids=[case.name for case in WRONG])
def test_default_divide_factor_makes_expert_gradients_too_big(case: Case, spread: Path) -> None:
    true, found = trained(ALONE[0], steps=1, clip=None), torch.load(spread / f"{case.name}.pt", weights_only=True)
    names = [name for name in true if name.startswith("grad/")]
    assert sum(".experts." in name for name in names) == 8
    for name in names:
        # Times 4, as a loss that is a mean over this rank's labels would have it.
        times = int(case.parallel["expert"]) if ".experts." in name else 1
        assert relative(4 * found[name], times * true[name]) < 1e-12, name
