"""Under Composer's Trainer: our trainer's losses, on every way that it spreads a model; checkpoints; resume."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmfoundry.integrations.torchvision_operators  # noqa: F401  before composer

pytest.importorskip("composer", reason="Composer's environment: make setup-composer")

from composer_runs import STEPS, ours, run

TOLERANCE = 1e-5  # nats: float32 sums in another order
TWO_RANKS = ("ddp", "fsdp2", "presharded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts to train and evaluate on, and conversations."""
    made = tmp_path_factory.mktemp("composer")
    words = "the cat sat on a mat while two dogs ran over green hills and far away".split()
    random = torch.Generator().manual_seed(0)

    def text(n: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (n,), generator=random).tolist())

    for name, count in (("texts", 40), ("held-out", 4)):
        (made / name).mkdir()
        for i in range(count):
            (made / name / f"{i}.txt").write_text(text(60))
    rows = [{"prompt": text(1 + i % 7), "response": text(3)} for i in range(120)]
    (made / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def on_two_ranks(folder: Path, way: str) -> dict[str, object]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "NODE_RANK": "0", "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip
    script = Path(__file__).with_name("composer_runs.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), way],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0, output[-4000:]
    return json.loads((folder / f"{way}.json").read_text())


def close(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert len(expected["losses"]) == STEPS  # type: ignore[arg-type]
    assert found["eval"] == pytest.approx(expected["eval"], abs=TOLERANCE)


@pytest.mark.parametrize("way", ["plain", "their_schedule", "microbatches", "masked", "resumed"])
def test_losses_are_those_of_our_trainer(way: str, folder: Path) -> None:
    close(run(folder, way), ours(folder, way))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("way", TWO_RANKS)
def test_losses_on_two_ranks_are_those_of_one(way: str, folder: Path) -> None:
    close(on_two_ranks(folder, way), ours(folder, way))
