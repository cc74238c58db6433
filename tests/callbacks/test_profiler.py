# ruff: noqa: F811  (the fixture `recipe`)
"""`profiler` and `memory_snapshot`: the table by part, the trace, and what is written when memory runs out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from llmfoundry.callbacks.profiler import IDLE, OTHER, by_part, covered, part_of, table
from llmfoundry.cli.train import train_main
from tests.test_cli import recipe  # noqa: F401  a fixture

MIXTURE = "model.ffn_config={ffn_type: moe, moe_num_experts: 4, moe_top_k: 2, ffn_hidden_size: 32}"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", "communication"),
        ("void at::native::split_with_sizes_copy_out_contiguous_no_cast_kernel", "communication"),
        ("up_backward_kernel", "experts"),
        ("weight_grad_kernel", "experts"),
        ("spread_kernel", "gather and sum of rows"),
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
    assert part_of(name) == part


def test_shares_are_of_the_step_and_idle_is_what_no_kernel_covers() -> None:
    lines = by_part([("up_kernel", 4000.0), ("nccl", 1000.0), ("up_kernel", 2000.0)], 10_000.0, 2, idle=3000.0)
    assert [tuple(line) for line in lines] == [
        ("experts", 3.0, 0.6), (IDLE, 1.5, 0.3), ("communication", 0.5, 0.1)
    ]  # fmt: skip
    assert table(lines).splitlines()[0].split() == ["experts", "3.00", "ms", "60.0%"]
    assert covered([(0, 2), (1, 3), (5, 6)]) == 4


def test_a_run_is_profiled(recipe: Path, tmp_path: Path) -> None:
    options = ["max_duration=5ba", "callbacks.profiler={start: 3, steps: 2}", MIXTURE]
    assert train_main([str(recipe), *options]) == 0
    folder = tmp_path / "run" / "profile"
    text = (folder / "steps-3-4-rank-0.txt").read_text()
    assert "dense products" in text and "update" in text
    trace = json.loads(gzip.decompress((folder / "steps-3-4-rank-0.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if "name" in event]
    assert sum(name.startswith("Optimizer.step#") for name in names) == 2


def test_a_run_that_is_too_short_says_so(
    recipe: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert train_main([str(recipe), "callbacks.profiler={start: 2, steps: 9}"]) == 0
    assert "the run ended before step 10" in caplog.text and not (tmp_path / "run" / "profile").exists()


def test_a_snapshot_of_memory_does_nothing_on_a_cpu(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe), "callbacks.memory_snapshot={interval: 1ba}"]) == 0
    assert not (tmp_path / "run" / "memory").exists()


@pytest.mark.gpu
def test_snapshots_at_an_interval_and_when_memory_runs_out(recipe: Path, tmp_path: Path) -> None:
    options = ["callbacks.memory_snapshot={interval: 1ba}", "callbacks.profiler={start: 2, steps: 1}"]
    assert train_main([str(recipe), *options, MIXTURE]) == 0
    found = {path.name for path in (tmp_path / "run" / "memory").iterdir()}
    assert found == {"step-1-rank-0.pickle", "step-2-rank-0.pickle"}
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert (tmp_path / "run" / "memory" / "out-of-memory-rank-0.pickle").is_file()
    text = (tmp_path / "run" / "profile" / "steps-2-2-rank-0.txt").read_text()
    assert "experts" in text and "idle" in text
