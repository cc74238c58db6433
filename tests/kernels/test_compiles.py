"""The experts' kernels compile for an H100 with next to no spills, and fit into its shared memory. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SHARED = 227 * 1024  # bytes that one block may use on an H100; 1 KB of each block is the system's
REGISTERS = 65536  # of an SM


CASES = [  # shape, dtype, turns, rank of adapters
    ("qwen30b", "bf16", 5, 0),
    ("gpt_oss", "bf16", 1, 0),
    ("qwen30b", "fp32", 1, 0),
    ("qwen30b", "bf16", 1, 16),
    ("dbrx", "bf16", 5, 64),
    ("qwen30b", "fp32", 1, 16),
]
UPDATES = [("updates", state, 1, 0) for state in ("fp32", "bf16")]
E4M3 = [("qwen30b", "e4m3", 5, 0), ("dbrx", "e4m3", 1, 0)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the kernels of all cases use: one process, for its imports take longer than a kernel."""
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *(",".join(map(str, case)) for case in [*CASES, *UPDATES, *E4M3])],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_kernels_that_only_move_bytes_compile_without_spills(compiled: list[dict[str, Any]], state: str) -> None:
    rows = [row for row in compiled if row["case"] == f"updates,{state},1,0"]
    passes = {"adamw", "adamw of float32 weights", "adamw of halves", "adamw of 8 bits", "adamw of 8 bits, halves"}
    passes |= {"lion", "lion of halves", "momentum", "apply", "add", "add parts", "sum of tokens over ranks"}
    passes |= {"routing of a rank", "norm and rotation", "norm and rotation, backward", "loss", "scale", "norm"}
    assert {row["kernel"] for row in rows} == passes | {"symmetric, wide", "symmetric, tall"}
    assert not any(row["spilled"] for row in rows), rows
    assert all(row["shared"] <= SHARED for row in rows), rows
    symmetric = [row for row in rows if row["kernel"].startswith("symmetric") and state == "bf16"]
    assert all(row["registers"] <= 128 and 2 * row["shared"] <= SHARED for row in symmetric), "two on an SM"


@pytest.mark.slow
@pytest.mark.parametrize("case", E4M3)
def test_the_kernels_of_e4m3_compile_without_spills(compiled: list[dict[str, Any]], case: tuple[object, ...]) -> None:
    rows = [row for row in compiled if row["case"] == ",".join(map(str, case))]
    assert {"gather", "activate backward", "product", "weight gradient"} <= {row["kernel"] for row in rows}
    assert not any(row["spilled"] for row in rows), rows
    assert all(row["shared"] <= SHARED for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype", "turns", "rank"), CASES)
def test_kernels_fit_a_hopper_gpu(
    compiled: list[dict[str, Any]], shape: str, dtype: str, turns: int, rank: int
) -> None:
    rows = [row for row in compiled if row["case"] == f"{shape},{dtype},{turns},{rank}"]
    narrow = {"narrow", "narrow_grad"} if rank else set()
    assert {row["kernel"] for row in rows} == {"up", "down", "dx", "up_backward", "weight_grad"} | narrow
    in_gluon = {"up", "down", "dx", "weight_grad"} if dtype == "bf16" and not rank else set()
    assert {row["kernel"] for row in rows if row["gluon"]} == in_gluon
    for row in rows:
        assert row["shared"] <= SHARED, row
        assert row["warps"] * 32 * row["registers"] <= REGISTERS, row
        # One TF32 product would leave 10 of float32's 23 bits; three leave 21.
        assert row["gluon"] or row["precision"] == ["tf32x3"], row
        # 256 columns by 16 warps spill 24 bytes, and were measured to beat 128 columns, which spill none. With a clamp
        # they spill 128; in 8 slices instead of 4 it is 32, and was measured to be 33 % slower.
        allowed = (128 if row["case"].startswith("gpt_oss") else 24) if row["kernel"] == "up_backward" else 0
        assert row["spilled"] <= allowed, row
