"""Ranks whose machines share nothing but a store, and fewer of them after a restart."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import yaml
from test_torchrun import RECIPE, ROOT, launch

from llmfoundry.cli.train import train_main
from tests import forks

pytestmark = pytest.mark.dist

# Each rank has a cache of its own, as on a machine of its own, and does not wait long for a folder to show there.
# Rank 1 cannot write the third checkpoint, nor upload the second.
APART = """
import errno
import os

from llmfoundry import runtime
from llmfoundry.checkpoint import storage, store
from llmfoundry.train import outputs

os.environ["LLMFOUNDRY_CACHE"] += f"/machine-{runtime.rank()}"
outputs._PROBE_SECONDS = 0.2

def failing(real, part):
    def act(file, *rest):
        if runtime.rank() == 1 and any(part in str(each) for each in (file, *rest)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, *rest)
    return act

storage._write_file = failing(storage._write_file, "step-3.")
store.put = failing(store.put, "step-2/")
"""
STORE = {"max_duration": "6ba", "save_interval": "1ba", "autoresume": True}


def losses(folder: Path) -> list[tuple[int, int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["tokens"], line["loss/train/ce"]) for line in lines]


def test_machines_that_share_nothing_but_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apart.py").write_text(APART)
    undisturbed = launch(tmp_path / "undisturbed", **STORE)
    assert undisturbed.wait(300) == 0
    store = tmp_path / "store" / "run"
    for attempt, steps in (("first", "4ba"), ("second", "6ba")):  # the second on machines that have nothing
        monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / attempt))
        more = STORE | {"save_folder": f"file://{store}", "code_paths": [str(tmp_path / "apart.py")]}
        started = launch(tmp_path / "run", **(more | {"max_duration": steps}))
        output, _ = started.communicate(timeout=300)
        assert started.returncode == 0, output
        for rank in (0, 1):  # all ranks agree on what has failed
            for why in ("step 2 could not be uploaded", "step 3 could not be saved"):
                assert (f"[rank {rank}] {why} to" in output) == (attempt == "first"), output
            assert not list((tmp_path / attempt / f"machine-{rank}" / "runs").rglob("*.safetensors"))
    files = {file.name for file in (store / "checkpoints" / "step-6").iterdir()}
    assert {f"{group}-0000{rank}.safetensors" for group in ("model", "optimizer", "rng") for rank in (0, 1)} <= files
    assert (tmp_path / "second" / "machine-1" / "remote").is_dir(), "each machine fetched"
    assert {path.name for path in (store / "checkpoints").iterdir()} == {"step-1", "step-4", "step-5", "step-6"}
    assert losses(store) == losses(tmp_path / "undisturbed" / "run")


def agent(folder: Path, port: int, node: int) -> forks.Started:
    """torchrun on one of two nodes, which goes on with one if the other is lost."""
    command = [*forks.TORCHRUN, "--nnodes", "1:2", "--nproc-per-node", "1",
               "--rdzv-id", "run", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
               "--rdzv-conf", f"is_host={int(node == 0)},last_call_timeout=10,keep_alive_interval=1,join_timeout=60",
               "--local-addr", "127.0.0.1", "--max-restarts", "3", "--monitor-interval", "0.2",
               str(ROOT / "scripts" / "train.py"), str(folder / "run.yaml")]  # fmt: skip
    more = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NODE": str(node),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # as docs/many-gpus.md says for several nodes
    return forks.start(*command, env=os.environ | more)


def kill(torchrun: forks.Started) -> None:
    """End a node: torchrun and its rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for pid in (torchrun.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)


LOSES_A_NODE = """
import os
import signal

from llmfoundry.train.callback import Callback, CallbackConfig

class Lose(Callback):
    def step_end(self, trainer, metrics):
        if os.environ["NODE"] == "1" and trainer.state.step == 3:
            os.kill(os.getppid(), signal.SIGKILL)  # torchrun of this node
            os.kill(os.getpid(), signal.SIGKILL)

class LoseConfig(CallbackConfig, names=("loses",)):
    def build(self):
        return Lose()
"""


def test_a_run_that_loses_a_node_goes_on_with_the_other_and_the_same_global_batch(tmp_path: Path) -> None:
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(tmp_path / "cache")}
    more = {"max_duration": "16ba", "save_interval": "1ba", "save_num_checkpoints_to_keep": 2, "autoresume": True,
            "parallel": {}, "train_loader": {"dataset": text | {"split": "train"}}}  # fmt: skip
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        config = RECIPE | more | {"save_folder": str(tmp_path / name / "run")}
        if name == "two":
            (tmp_path / "loses.py").write_text(LOSES_A_NODE)
            config |= {"code_paths": [str(tmp_path / "loses.py")], "callbacks": {"loses": {}}}
        (tmp_path / name / "run.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = {node: agent(tmp_path / "two", port, node) for node in (1, 0)}  # 1 waits for 0, not 0 for 1
    try:
        output, _ = nodes[0].communicate(timeout=300)
    finally:
        for node in nodes.values():
            if node.poll() is None:
                kill(node)
    assert nodes[0].returncode == 0, output
    assert train_main([str(tmp_path / "one" / "run.yaml")]) == 0 and "continuing from" in output
    ranks = [json.loads(file.read_text())["saved_by"]["ranks"] for file in (tmp_path / "two").rglob("trainer.json")]
    assert ranks == [1, 1]
    one, two = losses(tmp_path / "one" / "run"), losses(tmp_path / "two" / "run")
    assert [line[:2] for line in one] == [line[:2] for line in two], "steps, and the tokens of each"
    # Two ranks sum a batch in another order than one: as between meshes, 1e-5 of the loss.
    assert [line[2] for line in two] == pytest.approx([line[2] for line in one], rel=1e-5)
