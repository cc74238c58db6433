"""`device_train_microbatch_size: auto`: fewer rows at once when memory runs out, on all ranks, with the same gradients.

Memory runs out in a block of the real model: a plug-in raises what torch raises above a number of rows.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.fsdp import FSDPModule

from llmfoundry.train.microbatch import fitting, smaller
from tests import forks
from tests.callbacks.conftest import tiny_run

ROOT = Path(__file__).resolve().parents[2]
HELD = re.compile(
    r"(weights|optimizer|gradients|activations and other) ([\d.]+) [GM]iB(?: \(planned ([\d.]+) [GM]iB\))?"
)
PLUG_IN = """
import torch
from llmfoundry import runtime
from llmfoundry.model.transformer import Block
from llmfoundry.train import out_of_memory

ROWS, RANK, WHEN, CALLS = {rows}, {rank}, "{when}", {calls}
if {figures}:
    out_of_memory.allocator = lambda device: out_of_memory.Allocator(80 * 2**30, 70 * 2**30, 73 * 2**30)
real, seen = Block.forward, []

def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has none. And so on.")

def forward(block, x, *args, **kwargs):
    if runtime.rank() == RANK and torch.is_grad_enabled():
        seen.append(x.shape[0])
    # Two rows fit for some calls: then a step is left in the middle.
    is_full = runtime.rank() == RANK and (x.shape[0] > 2 or x.shape[0] > ROWS and seen.count(x.shape[0]) > CALLS)
    if is_full and WHEN == "forward":
        full()
    out = real(block, x, *args, **kwargs)
    if is_full and torch.is_grad_enabled():
        hidden = out[0] if isinstance(out, tuple) else out
        hidden.register_hook(full)
    return out

Block.forward = forward
"""


def run(
    folder: Path, name: str, ranks: int, micro: int | str, plug_in: dict[str, object] | None, **more: object
) -> subprocess.CompletedProcess[str]:
    """A run of 8 rows a step in processes of its own."""
    config = tiny_run(folder) | {
        "save_folder": str(folder / name), "global_train_batch_size": 8, "eval_interval": "0ba",
        "device_train_microbatch_size": micro, "max_duration": "2ba",
    } | more  # fmt: skip
    if plug_in is not None:
        (folder / f"{name}.py").write_text(
            PLUG_IN.format(**({"rank": ranks - 1, "calls": 0, "figures": False} | plug_in))
        )
        config["code_paths"] = [str(folder / f"{name}.py")]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    launcher = [*forks.TORCHRUN, "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return forks.run(*launcher, str(ROOT / "scripts" / "train.py"), str(file), env=environment)


def steps(folder: Path) -> list[dict[str, object]]:
    """metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("throughput/", "time/"))} for line in lines]


def test_one_process_goes_on_with_what_fits(tmp_path: Path) -> None:
    assert run(tmp_path, "two", 1, 2, None).returncode == 0
    for when in ("forward", "backward"):
        done = run(tmp_path, when, 1, "auto", {"rows": 2, "when": when})
        assert done.returncode == 0, done.stderr
        assert "out of memory with 8 rows at once: continuing with 4" in done.stderr
        assert "out of memory with 4 rows at once: continuing with 2" in done.stderr
        assert steps(tmp_path / when) == steps(tmp_path / "two"), "bit by bit what two rows at once give"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="FSDP2 cannot leave a step before torch 2.13")
@pytest.mark.parametrize(
    ("parallel", "moments"),
    [
        ({"expert": 2, "reduce_once_a_step": True}, [("forward", 0), ("backward", 2)]),
        ({"shard": 2}, [("backward", 0)]),
    ],
)
def test_two_ranks_go_on_together_when_one_is_full(
    tmp_path: Path, parallel: dict[str, int], moments: list[tuple[str, int]]
) -> None:
    """In the middle of a block's collectives; also after whole microbatches whose gradients must not count twice."""
    assert run(tmp_path, "one", 2, 1, None, parallel=parallel).returncode == 0
    for when, calls in moments:
        done = run(tmp_path, when, 2, "auto", {"rows": 1, "when": when, "calls": calls}, parallel=parallel)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("continuing with") == 2 and "continuing with 1 (" in done.stderr, done.stderr
        assert steps(tmp_path / when) == steps(tmp_path / "one"), when


@pytest.mark.parametrize("micro", ["auto", pytest.param(4, marks=pytest.mark.slow)])  # a plan is a process more
def test_what_fits_in_no_way_ends_in_one_line(tmp_path: Path, micro: int | str) -> None:
    """It names what held the memory, by the plan and by the allocator, and the keys that need less."""
    figures = micro == 4  # of the allocator, which a CPU has not
    plug_in = {"rows": 0, "when": "backward", "figures": figures}
    done = run(
        tmp_path, "auto", 1, micro, plug_in, parallel={"compile": False}, precision="fp32"
    )  # planned without tracing
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    rows = "4 rows" if figures else "1 row"
    assert line.startswith(f"error: out of memory with {rows} at once; held: weights ")
    assert line.endswith("(CUDA out of memory. Tried to allocate 9.00 GiB)")
    found = {name: (float(size), float(plan or "nan")) for name, size, plan in HELD.findall(line)}
    assert found.keys() == {"weights", "optimizer", "gradients"} | ({"activations and other"} if figures else set())
    assert found["weights"][0] > 0 == found["optimizer"][0], "the first step makes the moments last"
    keys = line.partition("less is needed with ")[2].split(" (CUDA")[0].split(", ")
    state = ["optimizer.state_dtype=bf16", "optimizer.master_weights=bf16_sr"]
    micro_rows, rest = ["device_train_microbatch_size=2"], ["parallel.recompute=full", "a shorter max_seq_len"]
    if figures:
        assert found["weights"][1] == found["weights"][0] and found["optimizer"][1] > 0
        assert found["activations and other"][0] == pytest.approx(70, abs=0.1)
        assert "reserved without use 3.00 GiB, of 80.00 GiB" in line
        assert keys == [*micro_rows, *rest, *state, "more GPUs"]
    else:
        assert keys == [*state, *rest, "more GPUs"]


def test_an_evaluation_that_does_not_fit_ends_in_one_line(tmp_path: Path) -> None:
    keys = {"eval_interval": "1ba", "device_eval_batch_size": 4}
    done = run(tmp_path, "evaluated", 1, 2, {"rows": 8, "when": "forward"}, **keys)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "error: out of memory in an evaluation; a smaller device_eval_batch_size than 4 needs less "
        "(CUDA out of memory. Tried to allocate 9.00 GiB)"
    )


def test_every_rank_has_equally_many_microbatches() -> None:
    assert fitting(4, 8, 8) == 4
    assert fitting(2, 3, 4) == 2
    assert fitting(2, 4, 5) == 0, "4 rows are 2 microbatches or 4, 5 are 3 or 5"
    assert fitting(3, 4, 5) == 3


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(8, 8, [4, 2, 1]), (12, 12, [6, 4, 3, 2, 1]), (24, 24, [12, 8, 6, 4, 3, 2, 1]), (7, 7, [4, 2, 1]), (3, 4, [2, 0]),
     (4, 5, [3, 0])],
)  # fmt: skip
def test_the_next_size_is_the_largest_of_equal_microbatches(least: int, most: int, expected: list[int]) -> None:
    found = [most]
    while found[-1] > 1:
        found.append(smaller(found[-1], least, most))
    assert found[1:] == expected
