"""bfloat16 compute over weights in float32 or bfloat16, on every kind of mesh: what GPUs train in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import run_ranks
from shared_memory import PeersOnCPU
from tiny import Case
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.config import check, dump
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.parallel import direct
from tests.reads import CountsReads

pytestmark = pytest.mark.dist
STEPS = 3
WAYS = ("packed", "direct", "auto")  # to gather experts; auto: by copies
CASES = [
    Case("shard 2"),
    Case("shard 2, tied, full", {"recompute": "full"}, tied=True),
    Case("shard 2, expert 2", {"expert": 2}),
    Case("shard 2, expert 2, selective, microbatch 2", {"expert": 2, "recompute": "selective"}, microbatch=2),
    Case("replicate 2", {"replicate": 2}),
    Case("shard 2, adapters"),
    Case("shard 2, expert 2, adapters", {"expert": 2}),
    Case("shard 2, microbatch 2, bf16_sr", {"reduce_once_a_step": False}, microbatch=2, half=True),
    Case("shard 2, expert 2, microbatch 2, bf16_sr", {"expert": 2}, microbatch=2, half=True),
    Case("shard 2, expert 2, full, bf16_sr", {"expert": 2, "recompute": "full"}, half=True),
    Case("shard 2, expert 2, bf16_sr, adapters", {"expert": 2}, half=True),
    Case("shard 2, expert 2, halves", {"expert": 2}, half=True, split=True),
    Case("shard 2, expert 2, sums in bf16", {"expert": 2, "sum_gradients_in": "bf16"}, microbatch=2, half=True,
         split=True),
]  # fmt: skip
# The same numbers to the bit, by FSDP alone, directly, and by copies. And how many times more FSDP copies by itself:
# experts are most of the values, but it sums whole gradients of microbatches in any case.
SAME = [
    (Case("shard 2, float32"), 2.5),
    (Case("shard 2, halves", half=True, split=True), 2.5),
    (Case("each", {"reduce_once_a_step": False, "recompute": "full", "prefetch": 2}, microbatch=2), 2.5),
    (Case("each, halves", {"reduce_once_a_step": False}, microbatch=2, half=True, split=True), 2.5),
    (Case("once", {"reshard_after_forward": False}, microbatch=2), 1.5),
]  # fmt: skip

ALONE = [
    Case("alone"),
    Case("alone, tied, full", {"recompute": "full"}, tied=True),
    Case("alone, selective, microbatch 2", {"recompute": "selective"}, microbatch=2),
    Case("alone, adapters"),
    Case("alone, adapters, full", {"recompute": "full"}),
    Case("alone, tied, bf16_sr", tied=True, half=True),
    Case("alone, selective, microbatch 2, bf16_sr", {"recompute": "selective"}, microbatch=2, half=True),
    Case("alone, bf16_sr, adapters", half=True),
]
# What keeps FSDP in a group of one. On a CPU weights are in host memory anyway.
BY_FSDP = {"cpu_offload": True}


def model_config(case: Case) -> CausalLMConfig:
    keys = dump(tiny.model_config(case))
    if not case.name.endswith(("adapters", "adapters, full")):
        return check(CausalLMConfig, keys)
    keys["ffn_config"] |= {"moe_bias_update_rate": 0.0}
    return check(CausalLMConfig, keys | {"lora": {"rank": 2, "alpha": 8.0}})


def learn(case: Case, precision: str) -> dict[str, Tensor]:
    """Losses and gradient norms; in bf16, the weights' and gradients' dtypes are looked at too."""
    config = model_config(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "model_config", lambda _: config)
        model = tiny.build(case, torch.float32, precision)
    lean = case.name.startswith("alone") and case.microbatch == tiny.ROWS and not case.parallel.get("cpu_offload")
    expected = torch.bfloat16 if lean and precision == "amp_bf16" else torch.float32

    lean_experts = case.microbatch == tiny.ROWS or case.parallel.get("sum_gradients_in") == "bf16"
    whole = case.half and case.parallel.get("expert") == 2 and lean_experts and precision == "amp_bf16"

    def watch(model: CausalLM) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == (torch.bfloat16 if case.half else torch.float32), name
                assert parameter.grad is not None, name
                assert parameter.grad.dtype == (torch.bfloat16 if whole and ".experts." in name else expected), name
            else:
                assert parameter.dtype == (torch.bfloat16 if precision == "amp_bf16" else torch.float32), name

    results = tiny.train(model, case, STEPS, 1.0, watch=watch)
    return {name: torch.stack([getattr(step, name) for step in results]).double() for name in ("ce", "grad_norm")}


def copied(patch: pytest.MonkeyPatch) -> list[int]:
    """How many values FSDP copies out of its gathered buffers, and into those that it reduces, from now on."""
    found: list[int] = []
    for name in ("split_with_sizes_copy", "_chunk_cat"):
        operator = getattr(torch, name)

        def count(
            *args: object, out: Tensor | list[Tensor], operator: Callable[..., object] = operator, **keys: object
        ):
            found.extend(each.numel() for each in (out if isinstance(out, list) else [out]))
            return operator(*args, out=out, **keys)

        patch.setattr(torch, name, count)
    return found


def same_in_every_way(folder: Path) -> None:
    """What each way finds."""
    for case, _ in SAME:
        for way in WAYS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(direct, "Peers", PeersOnCPU)
                values = copied(patch)
                found = learn(case._replace(parallel=case.parallel | {"gather_experts": way}), "amp_bf16")
            if dist.get_rank() == 0:
                torch.save(found | {"copied": torch.tensor(sum(values))}, folder / f"{case.name}, {way}.pt")


def collectives_of_a_step() -> int:
    """How many all-reduces of all ranks a step makes whose parameters are split in two ways."""
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        reduce, train = dist.all_reduce, tiny.train
        patch.setattr(dist, "all_reduce", lambda *args, **keys: (calls.append(1), reduce(*args, **keys))[1])
        patch.setattr(tiny, "train", lambda *args, **keys: (calls.clear(), train(*args, **keys))[1])
        learn(Case("shard 2, expert 2", {"expert": 2}), "amp_bf16")
    return len(calls) // STEPS


def reads_of_a_step() -> list[str]:
    """What the host reads of a step with two microbatches, of a dense model: on a CPU, experts read their loads."""
    keys = dump(tiny.model_config(Case("dense")))
    keys["ffn_config"] = {"ffn_type": "mptglu", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}}
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "model_config", lambda _: check(CausalLMConfig, keys))
        for name in ("adamw", "decoupled_lionw", "muon"):
            case = Case("dense", microbatch=2, optimizer=name, state="bf16", half=True, split=True)
            model = tiny.build(case, torch.float32, "amp_bf16")
            optimizer = tiny.new_optimizer(model, 1e-2, name, case.state, case.split)
            tiny.train(model, case, 1, 1.0, optimizer=optimizer)
            with CountsReads() as reads:
                tiny.train(model, case, range(1, 2), 1.0, optimizer=optimizer)
            found += reads.found
    return found


def job(folder: Path) -> None:
    alone = [case._replace(parallel=case.parallel | BY_FSDP) for case in ALONE]
    runtime.start(group_of_one=True)
    if dist.get_world_size() > 1:
        same_in_every_way(folder)
        calls, reads = collectives_of_a_step(), reads_of_a_step()
        if dist.get_rank() == 0:
            (folder / "collectives").write_text(str(calls))
            (folder / "reads").write_text(" ".join(reads))
    for case in CASES if dist.get_world_size() > 1 else alone:
        found = learn(case, "amp_bf16")
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{case.name}.pt")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    run_ranks([2, 1], job, folder)
    return folder


@pytest.mark.parametrize("case", ALONE, ids=[case.name for case in ALONE])
def test_a_process_alone_learns_bitwise_what_fsdp_over_one_rank_does(case: Case, spread: Path) -> None:
    found, theirs = learn(case, "amp_bf16"), torch.load(spread / f"{case.name}.pt", weights_only=True)
    for name, value in found.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(("case", "times"), SAME, ids=[case.name for case, _ in SAME])
def test_experts_without_copies_learn_bitwise_what_fsdp_does(case: Case, times: float, spread: Path) -> None:
    of_way = {each: torch.load(spread / f"{case.name}, {each}.pt", weights_only=True) for each in WAYS}
    for found in (of_way["direct"], of_way["auto"]):
        assert torch.equal(found["ce"], of_way["packed"]["ce"])
        assert torch.equal(found["grad_norm"], of_way["packed"]["grad_norm"])
        assert found["copied"] * times < of_way["packed"]["copied"]


def test_a_step_reduces_three_times_what_it_counts(spread: Path) -> None:
    """Labels before it, the experts' loads in its middle, and at its end all sums with the squared norm."""
    assert (spread / "collectives").read_text() == "3"


def test_a_step_on_two_ranks_reads_nothing(spread: Path) -> None:
    assert (spread / "reads").read_text() == ""


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bf16_follows_float32(case: Case, spread: Path) -> None:
    like = case.name.endswith("adapters")
    true = learn(Case("alone, adapters" if like else "alone", tied=case.tied), "fp32")
    found = torch.load(spread / f"{case.name}.pt", weights_only=True)
    # bf16 has eight bits; a token near a router's boundary goes to another expert, which moves the norm by per cents.
    torch.testing.assert_close(found["ce"], true["ce"], rtol=5e-3, atol=0)
    torch.testing.assert_close(found["grad_norm"], true["grad_norm"], rtol=5e-2, atol=0)
    assert not torch.equal(found["ce"], true["ce"]), "computed in float32"
