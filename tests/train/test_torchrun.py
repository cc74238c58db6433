"""Under torchrun: an error on one rank ends all of them at once, and a signal to one stops all in order."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests import forks

pytestmark = pytest.mark.dist
ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "max_seq_len": 32,
    "model": {
        "name": "causal_lm", "d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 320, "max_seq_len": 32,
        "attn_config": {"attn_type": "multihead_attention", "rope": True},
        "ffn_config": {"ffn_type": "moe", "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2,
                       "ffn_act_fn": {"name": "silu"}},
    },
    "tokenizer": {"name": "bpe", "vocab_size": 300},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "scheduler": {"name": "constant_with_warmup"},
    "max_duration": "1000ba",
    "eval_interval": "0ba",
    "save_interval": "0ba",
    "global_train_batch_size": 4,
    "parallel": {"expert": 2},
    "dist_timeout": 300.0,
    "log_to_console": False,
}  # fmt: skip
PLUG_IN = """
from llmfoundry import runtime
from llmfoundry.train.callback import Callback, CallbackConfig

class Break(Callback):
    def step_end(self, trainer, metrics):
        if runtime.rank() == 1 and trainer.state.step == 3:
            raise RuntimeError("a broken part")

class BreakConfig(CallbackConfig, names=("breaks",)):
    def build(self):
        return Break()
"""

KILLS = """
import os
import signal

from llmfoundry import runtime
from llmfoundry.checkpoint import storage
from llmfoundry.train.callback import Callback, CallbackConfig

attempt, real = os.environ["TORCHELASTIC_RESTART_COUNT"], storage._write_file

class Kill(Callback):
    def step_end(self, trainer, metrics):
        if runtime.rank() == 1 and trainer.state.step == 3 and attempt == "0":
            os.kill(os.getpid(), signal.SIGKILL)

def write_file(path, *rest):
    if runtime.rank() == 1 and "step-5." in str(path) and attempt == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, *rest)

storage._write_file = write_file

class KillConfig(CallbackConfig, names=("kills",)):
    def build(self):
        return Kill()
"""

SIGNAL_IN_EVALUATION = """
import os
import signal

from llmfoundry import runtime
from llmfoundry.data.loader import Loader

real = Loader.one_pass

def one_pass(loader, *args, **limit):
    for i, batch in enumerate(real(loader, *args, **limit), 1):
        print(f"rank {runtime.rank()}, batch {i}", flush=True)
        if i == 3 and runtime.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch

Loader.one_pass = one_pass
"""


def launch(tmp_path: Path, *, restarts: int = 0, **more: object) -> forks.Started:
    """torchrun with two processes, on the CPU."""
    tmp_path.mkdir(exist_ok=True)
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(tmp_path / "cache")}
    loader = {"train_loader": {"dataset": text | {"split": "train"}}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(RECIPE | loader | {"save_folder": str(tmp_path / "run")} | more))
    command = [*forks.TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return forks.start(*command, str(ROOT / "scripts" / "train.py"), str(file), env=environment)


def wait_for_steps(metrics: Path, n: int) -> None:
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < n:
        assert time.monotonic() < deadline, "the run does not get going"
        time.sleep(0.05)


def test_an_error_on_one_rank_is_shown_with_it_and_ends_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(PLUG_IN)
    started = launch(tmp_path, code_paths=[str(tmp_path / "breaks.py")], callbacks={"breaks": {}})
    wait_for_steps(tmp_path / "run" / "metrics.jsonl", 3)
    broken = time.monotonic()
    output, _ = started.communicate(timeout=300)
    assert time.monotonic() - broken < 60, "long before dist_timeout"
    assert started.returncode != 0
    assert "[rank 1] Traceback" in output and "RuntimeError: a broken part" in output
    assert "rank      : 1" in output.partition("Root Cause")[2], "torchrun names it, too"


def test_a_mistake_is_said_once_and_ends_torchruns_report(tmp_path: Path) -> None:
    started = launch(tmp_path, seed=-1)
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 1
    mistake = "error: seed: input should be greater than or equal to 0, found -1"
    assert output.count(f"[rank 0] {mistake}") == 1 and f"[rank 1] {mistake}" not in output
    *_, last, border = output.rstrip().splitlines()
    assert last == f"  traceback : {mistake}" and set(border) == {"="}
    assert "cli/command.py" not in output, "no traceback of ours"


def test_ranks_that_disagree_are_named_with_the_keys(tmp_path: Path) -> None:
    rate = "${oc.decode:0.0${oc.env:RANK}1}"
    started = launch(tmp_path, seed="${oc.decode:${oc.env:RANK}}", optimizer={"name": "adamw", "lr": rate})
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 1
    line = "error: rank 1 differs from rank 0: seed, optimizer.lr; give all ranks the same YAML"
    assert output.count(f"[rank 0] {line}") == 1 and "cli/command.py" not in output
    assert "exitcode  : 2" in output
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_ranks_with_other_texts_are_named(tmp_path: Path) -> None:
    """Each node may have the files elsewhere, but it must be the same text."""
    for rank, text in enumerate(("one text. ", "another one. ")):
        (tmp_path / f"node-{rank}").mkdir()
        (tmp_path / f"node-{rank}" / "text.txt").write_text(text * 500)
    place = {"path": str(tmp_path / "node-${oc.env:RANK}"), "cache_dir": str(tmp_path / "cache-${oc.env:RANK}")}
    started = launch(tmp_path, train_loader={"dataset": {"name": "text_files"} | place})
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 1
    assert "rank 1 differs from rank 0: the tokenizer, the data of train_loader;" in output


def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path: Path) -> None:
    started = launch(tmp_path)
    wait_for_steps(tmp_path / "run" / "metrics.jsonl", 3)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 3 <= summary["steps"] < 1000
    assert (tmp_path / "run" / "checkpoints" / f"step-{summary['steps']}" / "MANIFEST.json").exists()


def test_a_signal_to_one_rank_ends_an_evaluation_on_all(tmp_path: Path) -> None:
    (tmp_path / "signals.py").write_text(SIGNAL_IN_EVALUATION)
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "validation_fraction": 0.5}
    loader = {"dataset": text | {"split": "validation", "cache_dir": str(tmp_path / "cache")}}
    more = {"eval_loader": loader, "eval_interval": "2ba", "device_eval_batch_size": 1}
    started = launch(tmp_path, code_paths=[str(tmp_path / "signals.py")], **more)
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 0, output
    for rank in range(2):
        # A rank may have read one more batch when the other's signal comes; none works on it.
        assert f"rank {rank}, batch 3" in output and f"rank {rank}, batch 5" not in output
    assert (tmp_path / "run" / "checkpoints" / "step-2" / "MANIFEST.json").exists()
    assert "metrics/eval" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss/train/ce"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_restart_by_torchrun_goes_on_and_the_curve_is_the_undisturbed_one(tmp_path: Path) -> None:
    """A rank is killed after a step, and again inside a save."""
    (tmp_path / "kills.py").write_text(KILLS)
    same = {"max_duration": "6ba", "save_interval": "1ba", "autoresume": True}
    plug_in = {"code_paths": [str(tmp_path / "kills.py")], "callbacks": {"kills": {}}}
    killed = launch(tmp_path / "killed", restarts=2, **same, **plug_in)
    undisturbed = launch(tmp_path / "undisturbed", **same)
    output, _ = killed.communicate(timeout=300)
    others, _ = undisturbed.communicate(timeout=300)
    assert killed.returncode == 0, output
    assert undisturbed.returncode == 0, others
    assert output.count("exitcode: -9") >= 2 and output.count("continuing from") >= 2
    names = [{path.name for path in (tmp_path / run / "run" / "checkpoints").iterdir()}
             for run in ("killed", "undisturbed")]  # fmt: skip
    assert names[0] == names[1], "and nothing else is left"
    assert losses(tmp_path / "killed" / "run") == losses(tmp_path / "undisturbed" / "run")
