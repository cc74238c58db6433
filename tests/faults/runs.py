"""Runs of real processes that faults are put into: a tiny recipe, how it is started, and what it leaves."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import yaml

from tests import forks

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [*forks.TORCHRUN, "--standalone", "--nproc-per-node", "2"]
RECIPE: dict[str, object] = {
    "max_seq_len": 32,
    "model": {
        "d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 320, "max_seq_len": 32,
        "ffn_config": {"ffn_type": "moe", "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2,
                       "ffn_act_fn": {"name": "silu"}},
    },
    "tokenizer": {"name": "bpe", "vocab_size": 300},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "scheduler": {"name": "constant_with_warmup"},
    "max_duration": "100000ba",
    "eval_interval": "0ba",
    "save_interval": "0ba",
    "global_train_batch_size": 4,
    "log_to_console": False,
    "autoresume": True,
}  # fmt: skip


def recipe(folder: Path, **more: object) -> Path:
    """The YAML of a tiny run in `folder/run`; keys with dots in them are not for here."""
    folder.mkdir(exist_ok=True)
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(folder / "cache")}
    loader = {"train_loader": {"dataset": text | {"split": "train"}}}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(RECIPE | loader | {"save_folder": str(folder / "run")} | more))
    return file


def plug_in(folder: Path, code: str) -> dict[str, object]:
    """Keys of a run that has some code of its own."""
    folder.mkdir(exist_ok=True)
    file = folder / "fault.py"
    file.write_text(code)
    return {"code_paths": [str(file)]}


def start(file: Path, *overrides: str, ranks: int = 1, restarts: int = 0, **environment: str) -> forks.Started:
    """Train in one process, or under torchrun, on the CPU; stdout and stderr are one."""
    launcher = [*TORCHRUN, "--max-restarts", str(restarts)] if ranks == 2 else []
    return forks.start(
        *launcher, str(ROOT / "scripts" / "train.py"), str(file), *overrides,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
    )  # fmt: skip


def ended(started: forks.Started, code: int | None = None) -> str:
    """What a run has printed, once it has ended, with that exit code."""
    output, _ = started.communicate(timeout=300)
    assert code is None or started.returncode == code, output
    return output


def wait_for(file: Path, n_lines: int = 1, seconds: float = 300) -> None:
    """Wait until a file has so many lines."""
    deadline = time.monotonic() + seconds
    while not file.exists() or file.read_bytes().count(b"\n") < n_lines:
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.02)


def ranks_of(started: forks.Started) -> list[int]:
    """The processes that torchrun has started, rank 0 first."""
    return [int(pid) for pid in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()]


def metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, object]:
    """summary.json of a run."""
    found = json.loads((folder / "summary.json").read_text())
    assert isinstance(found, dict)
    return found


def is_saved(folder: Path, step: object) -> bool:
    """Whether there is a complete checkpoint of a step."""
    return (folder / "checkpoints" / f"step-{step}" / "MANIFEST.json").exists()


def leftovers(folder: Path) -> list[str]:
    """What a killed save has left."""
    return [path.name for path in (folder / "checkpoints").glob("*.tmp-*")]
