"""The same YAML on one GPU and on two: the same losses and gradient norms, over NCCL, with compiled blocks.

All runs go through torchrun and the training script, at the same time: each is far too small to fill a GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS, MIDDLE = 20, 10
RECIPE = {
    "max_seq_len": 64,
    "model": {
        "name": "causal_lm", "d_model": 64, "n_heads": 2, "n_layers": 3, "vocab_size": 320, "max_seq_len": 64,
        "norm_type": "rmsnorm", "no_bias": True,
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 1, "rope": True, "qk_norm": True},
        "ffn_config": {
            "ffn_type": "moe", "ffn_hidden_size": 64, "ffn_act_fn": {"name": "silu"}, "moe_num_experts": 8,
            "moe_top_k": 2, "moe_jitter_eps": 0.1, "moe_bias_update_rate": 0.01, "first_k_dense": 1,
            "shared_expert": True, "moe_loss_weight": 0.05, "moe_lbl_scope": "global_batch",
        },
        "init_config": {"name": "normal_", "init_std": 0.1},
    },
    "tokenizer": {"name": "bpe", "vocab_size": 300},
    "optimizer": {"name": "adamw", "lr": 0.005, "weight_decay": 0.1},
    "scheduler": {"name": "constant_with_warmup"},
    "algorithms": {"gradient_clipping": {"clipping_threshold": 1.0}},
    "max_duration": f"{STEPS}ba",
    "eval_interval": "0ba",
    "save_interval": f"{MIDDLE}ba",
    "global_train_batch_size": 8,
    "device_train_microbatch_size": 8,
    "precision": "fp32",
    "log_to_console": False,
}  # fmt: skip


class Case(NamedTuple):
    name: str
    gpus: int
    parallel: dict[str, int | str]
    microbatch: int


ALONE = Case("alone", 1, {}, 8)
SPREAD = [
    Case("shard-2", 2, {}, 4),
    Case("shard-2-full", 2, {"recompute": "full"}, 2),
    Case("expert-2", 2, {"expert": 2}, 4),
    Case("expert-2-selective", 2, {"expert": 2, "recompute": "selective"}, 1),
    Case("replicate-2", 2, {"replicate": 2}, 2),
]
Started = dict[str, subprocess.Popen[str]]


def launch(case: Case, folder: Path, **more: object) -> subprocess.Popen[str]:
    """One run, with files of its own."""
    text = {"name": "synthetic", "n_documents": 200, "document_words": 100, "cache_dir": str(folder / "cache")}
    config = RECIPE | {
        "train_loader": {"dataset": text | {"split": "train"}},
        "save_folder": str(folder / "run"),
        "parallel": case.parallel,
        "device_train_microbatch_size": case.microbatch,
    }
    folder.mkdir()
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config | more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.gpus)]
    return subprocess.Popen(
        [*command, str(ROOT / "scripts" / "train.py"), str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(runs: Started) -> dict[str, str]:
    """What each printed."""
    outputs = {name: run.communicate(timeout=280)[0] for name, run in runs.items()}
    failed = {name: outputs[name][-3000:] for name, run in runs.items() if run.returncode != 0}
    assert not failed, failed
    return outputs


def curve(folder: Path) -> dict[str, torch.Tensor]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/train/ce", "loss/train/total", "grad_norm")
    return {name: torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in names}


def assert_same_curve(ours: dict[str, torch.Tensor], true: dict[str, torch.Tensor], steps: slice) -> None:
    for metric, values in ours.items():
        torch.testing.assert_close(
            values, true[metric][steps], rtol=1e-5, atol=0, msg=lambda m, metric=metric: f"{metric}: {m}"
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs from the first step, then each continued from the middle of another's."""
    folder = tmp_path_factory.mktemp("runs")
    outputs = finish({case.name: launch(case, folder / case.name) for case in [ALONE, *SPREAD]})
    for name, output in outputs.items():
        (folder / f"{name}.log").write_text(output)
    continued: Started = {}
    for case, saved_on in [(ALONE, "expert-2"), (SPREAD[0], "expert-2"), (SPREAD[2], "shard-2"), (SPREAD[2], "alone")]:
        name = f"{saved_on} to {case.name}"
        saved = folder / saved_on / "run" / "checkpoints" / f"step-{MIDDLE}"
        continued[name] = launch(case, folder / name, load_path=str(saved))
    finish(continued)
    return folder


@pytest.mark.parametrize("name", [case.name for case in SPREAD])
def test_two_gpus_learn_what_one_learns(name: str, runs: Path) -> None:
    true, ours = curve(runs / "alone"), curve(runs / name)
    assert len(true["grad_norm"]) == STEPS and true["loss/train/ce"][-1] < 0.8 * true["loss/train/ce"][0]
    assert_same_curve(ours, true, slice(None))


def test_copy_engines_gather_experts(runs: Path) -> None:
    reached = torch.cuda.can_device_access_peer(0, 1)
    assert ("copy engines gather 4 of 4 tensors of experts" in (runs / "shard-2.log").read_text()) == reached
    assert "copy engines" not in (runs / "expert-2.log").read_text()


@pytest.mark.parametrize(
    "name", ["expert-2 to alone", "expert-2 to shard-2", "shard-2 to expert-2", "alone to expert-2"]
)
def test_a_checkpoint_continues_on_the_other_mesh(name: str, runs: Path) -> None:
    true, ours = curve(runs / "alone"), curve(runs / name)
    assert_same_curve(ours, true, slice(MIDDLE, None))


@pytest.mark.parametrize(("hang_timeout", "said"), [
    ("15s", "rank 1 does not answer: stopped, killed, or its host is gone; the others wait for it"),
    ("0s", "unspecified launch failure"),  # nobody watches: the barrier of the GPUs ends by itself
])  # fmt: skip
def test_a_gpu_waits_no_longer_for_a_stopped_rank_than_for_a_collective(
    hang_timeout: str, said: str, tmp_path: Path
) -> None:
    more = {"step_timeout": "20s", "hang_timeout": hang_timeout, "max_duration": "1000000ba", "save_interval": "0ba"}
    run = launch(SPREAD[0], tmp_path / "run", **more)
    metrics = tmp_path / "run" / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 200.0
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        ranks = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        os.kill(ranks[1], signal.SIGSTOP)
        begun = time.monotonic()
        while Path(f"/proc/{ranks[0]}/stat").exists() and ") Z" not in Path(f"/proc/{ranks[0]}/stat").read_text():
            assert time.monotonic() - begun < 45.0, "the other rank still waits"
            time.sleep(0.1)
        os.kill(ranks[1], signal.SIGKILL)
        output = run.communicate(timeout=60)[0]
    finally:
        run.kill()
    assert run.returncode == 1 and said in output, output[-3000:]
