# ruff: noqa: F811  (the fixture `recipe`)
"""`profiler` and `memory_snapshot`: the table by part, the trace, and what is written when memory runs out."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from llmfoundry.callbacks.memory_snapshot import MemorySnapshot, MemorySnapshotConfig
from llmfoundry.callbacks.profile_parts import (
    BACKWARD,
    COMMUNICATION,
    IDLE,
    OTHER,
    SCOPE,
    Chains,
    Line,
    Span,
    names_of,
    part_of,
    scopes,
    sweep,
    table,
)
from llmfoundry.cli.command import read_run_config
from llmfoundry.cli.train import train_main
from llmfoundry.train.build import build
from llmfoundry.train.callback import Metrics, Run
from llmfoundry.train.run import STEP
from tests import forks
from tests.parallel.ranks import free_port
from tests.test_cli import recipe  # noqa: F401  a fixture

MIXTURE = "model.ffn_config={ffn_type: moe, moe_num_experts: 4, moe_top_k: 2, ffn_hidden_size: 32}"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", "communication"),
        ("void at::native::split_with_sizes_copy_out_contiguous_no_cast_kernel", "communication"),
        ("up_backward_kernel", "experts"),
        ("weight_grad_kernel", "experts"),
        ("spread_kernel", "gather and dispatch"),
        ("_place_kernel", "router"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "dense products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "dense products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "update"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("triton_poi_fused_silu_mul_3", OTHER),
        ("aten::addmm", "dense products"),
    ],
)
def test_kernels_belong_to_parts(name: str, part: str) -> None:
    assert part_of([name]) == part


def test_the_module_that_runs_decides_unless_the_name_is_sure() -> None:
    assert part_of(["aten::mm", "aten::linear", SCOPE + "attention"]) == "attention"
    assert part_of(["aten::topk", SCOPE + "router"]) == "router"
    assert part_of(["aten::index_select", SCOPE + "experts"]) == "gather and dispatch"
    assert part_of(["aten::mm", BACKWARD + ": MmBackward0"], backward_of="loss") == "loss"
    assert part_of(["aten::mm", "LinearCrossEntropyBackward"]) == "loss"
    assert part_of(["aten::mul", "Optimizer.step#AdamW.step"]) == "update"


def test_each_moment_counts_once_and_idle_is_what_no_kernel_covers() -> None:
    spans = [Span(0, 4, "experts"), Span(2, 7, "communication"), Span(3, 5, "experts"), Span(8, 99, "loss")]
    assert dict(sweep(spans, [(0, 10), (20, 21)])) == {"experts": 5, "communication": 2, IDLE: 1, "loss": 3}
    text = table([Line("experts", 3.0, 0.75), Line(IDLE, 1.0, 0.25)])
    assert [row.split() for row in text.splitlines()[2:]] == [
        ["|", "experts", "|", "3.00", "|", "75.0%", "|"], ["|", "idle", "|", "1.00", "|", "25.0%", "|"],
        ["|", "step", "|", "4.00", "|", "100.0%", "|"],
    ]  # fmt: skip


def test_a_run_is_profiled_and_its_parts_add_up_to_the_step(recipe: Path, tmp_path: Path) -> None:
    options = ["max_duration=6ba", "callbacks.profiler={start: 3, steps: 3}", MIXTURE, "model.n_layers=2"]
    assert train_main([str(recipe), *options]) == 0
    folder = tmp_path / "run"
    profile = json.loads((folder / "profile.json").read_text())
    parts = {line["part"]: line["milliseconds"] for line in profile["parts"]}
    assert set(parts) >= {"attention", "router", "experts", "loss", "update", IDLE, OTHER} and min(parts.values()) >= 0
    seconds = [json.loads(line)["time/step_seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trace = json.loads(gzip.decompress((folder / "profile" / "steps-3-5-rank-0.json.gz").read_bytes()))
    steps = [event["dur"] for event in trace["traceEvents"] if event.get("name") == STEP and event["ph"] == "X"]
    assert len(steps) == 3
    assert sum(parts.values()) == pytest.approx(sum(steps) / 3e3, rel=0.01), "idle included"
    assert sum(parts.values()) == pytest.approx(1e3 * sum(seconds[2:5]) / 3, rel=0.05), "what the run itself measures"
    rows = (folder / "profile.md").read_text().splitlines()
    assert rows[0] == "Steps 3 to 5, per step:" and len(rows) == 5 + len(parts)


@pytest.mark.dist
def test_two_ranks_have_all_parts_and_a_trace_each(recipe: Path, tmp_path: Path) -> None:
    options = ["max_duration=4ba", "callbacks.profiler={start: 3, steps: 2, all_ranks: true}", MIXTURE,
               "parallel.expert=2", "parallel.compile=false"]  # fmt: skip
    ran = forks.run(*[*forks.TORCHRUN, "--nproc-per-node", "2", "--master-port", str(free_port()), "scripts/train.py",
                     str(recipe), *options])  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "run"
    for rank, name in enumerate(["profile", "profile-rank-1"]):
        data = json.loads((folder / f"{name}.json").read_text())
        assert data["rank"] == rank and {line["part"] for line in data["parts"]} >= {
            "attention", "router", "experts", "gather and dispatch", "loss", "update", COMMUNICATION, IDLE,
        }  # fmt: skip
        assert sum(line["share"] for line in data["parts"]) == pytest.approx(1, rel=0.01)
        assert (folder / "profile" / f"steps-3-4-rank-{rank}.json.gz").is_file()


def test_backward_belongs_to_the_module_whose_forward_made_it(recipe: Path, tmp_path: Path) -> None:
    model = build(read_run_config(str(recipe), ["model.n_layers=2"])).model
    with profile(activities=[ProfilerActivity.CPU]) as found, scopes(model), record_function(STEP):
        model(torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)).loss_sum.backward()
    assert not any(module._forward_hooks for module in model.modules()), "hooks are gone"
    chains = Chains([event for event in found.events() if event.device_type == DeviceType.CPU])
    of = [chains.part_of(e) for e in found.events() if e.name == "aten::mm" and "evaluate_function" in str(names_of(e))]
    # Two products of every weight: 4 in an attention (or fewer, joined), 2 in a dense block; the head's are elsewhere.
    assert of.count("attention") == of.count("dense feed-forward") == 2 * 2 * 2


def test_a_run_that_is_too_short_says_so(
    recipe: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert train_main([str(recipe), "callbacks.profiler={start: 2, steps: 9}"]) == 0
    assert "the run ended before step 10" in caplog.text and not (tmp_path / "run" / "profile.md").exists()


def test_a_snapshot_of_memory_does_nothing_on_a_cpu_and_says_so(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train_main([str(recipe), "callbacks.memory_snapshot={interval: 1ba}"]) == 0
    assert not (tmp_path / "run" / "memory").exists()
    assert caplog.text.count("memory_snapshot: no GPU is used, so nothing is recorded") == 1


def test_a_snapshot_is_asked_for_by_touching_a_file(tmp_path: Path) -> None:
    callback = MemorySnapshotConfig().build()
    callback._request = tmp_path / "request"
    asked = []
    for touched in (0, 0, 100, 100, 200):  # the time of the file; 0: it is not there
        if touched:
            callback._request.touch()
            os.utime(callback._request, (touched, touched))
        callback._looked = -math.inf  # else it is looked at once a second
        asked.append(callback._is_asked())
    assert asked == [False, False, True, False, True]


@pytest.mark.gpu
def test_snapshots_at_an_interval_and_when_memory_runs_out(recipe: Path, tmp_path: Path) -> None:
    options = ["callbacks.memory_snapshot={interval: 1ba}", "callbacks.profiler={start: 2, steps: 1}"]
    assert train_main([str(recipe), *options, MIXTURE]) == 0
    found = {path.name for path in (tmp_path / "run" / "memory").iterdir()}
    assert found == {"step-1-rank-0.pickle", "step-2-rank-0.pickle"}
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert (tmp_path / "run" / "memory" / "out-of-memory-rank-0.pickle").is_file()
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    parts = {line["part"]: line["milliseconds"] for line in profile["parts"]}
    assert {"attention", "router", "experts", "loss", "update", IDLE} <= set(parts)
    assert sum(line["share"] for line in profile["parts"]) == pytest.approx(1, rel=0.01)


@pytest.mark.gpu
def test_a_snapshot_on_demand(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = MemorySnapshot.step_end

    def touched(callback: MemorySnapshot, trainer: Run, metrics: Metrics) -> None:
        callback._looked = 0.0  # else it is looked at once a second
        if trainer.state.step == 3:
            (tmp_path / "run" / "memory" / "request").touch()
        real(callback, trainer, metrics)

    monkeypatch.setattr(MemorySnapshot, "step_end", touched)
    assert train_main([str(recipe), "callbacks.memory_snapshot={}", "max_duration=5ba"]) == 0
    assert {path.name for path in (tmp_path / "run" / "memory").glob("*.pickle")} == {"step-3-rank-0.pickle"}
