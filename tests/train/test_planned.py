"""`parallel.reduce_once_a_step: auto`: what the plan chooses, the same on every rank and in `--dry-run`."""

from __future__ import annotations

import io
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llmfoundry.callbacks  # noqa: F401  registers the callbacks that the YAMLs name
from llmfoundry.cli.command import read_run_config
from llmfoundry.parallel.mesh import Degrees, Mesh
from llmfoundry.planning import settle as plan_process
from llmfoundry.planning.hardware import GIB, RESERVE
from llmfoundry.planning.job import Job
from llmfoundry.planning.settle import settled
from llmfoundry.train import planned
from llmfoundry.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
MESH = Mesh(Degrees(1, 2, 1), None, None, 0, 2)
NODES = Mesh(Degrees(1, 16, 1), None, None, 0, 16)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_graphs_are_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def run_config(*more: str) -> RunConfig:
    """One layer of OLMoE on two GPUs, two rows each in microbatches of one."""
    keys = ("model.n_layers=1", "parallel.compile=false", "global_train_batch_size=4", "device_train_microbatch_size=1")
    return read_run_config(str(ROOT / "yamls" / "olmoe-1b-7b.yaml"), [*keys, *more])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's process runs here; starting one takes seconds."""

    def run(command: list[str], input: bytes, **_: object) -> subprocess.CompletedProcess[bytes]:
        assert command[1:] == ["-m", plan_process.__name__]
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input)))
            patch.setattr(sys, "stdout", out)
            plan_process.main()
        return subprocess.CompletedProcess(command, 0, out.getvalue().encode())

    monkeypatch.setattr(planned.subprocess, "run", run)


def test_gradients_are_summed_once_a_step_where_whole_ones_fit_and_it_is_shorter(
    in_process: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between nodes it is shorter; within one, the links hide the sums of each microbatch."""
    caplog.set_level(logging.INFO)
    config = run_config("global_train_batch_size=32")
    job = Job.of(config)
    once, held = settled(job, NODES.degrees, 79 * GIB)
    each, less = settled(job, NODES.degrees, held.total - 1)
    assert (once.parallel.reduce_once_a_step, each.parallel.reduce_once_a_step) == (True, False)
    assert less.gradients < held.gradients and less.total < held.total
    assert settled(Job.of(run_config()), MESH.degrees, 79 * GIB)[0].parallel.reduce_once_a_step is False
    for memory, expected in ((held.total + RESERVE, True), (held.total + RESERVE - 1, False)):
        monkeypatch.setattr(planned, "card_memory", lambda _, memory=memory: memory)
        assert planned.settle(config, NODES, CUDA).reduce_once_a_step is expected
    first, second = (line for line in caplog.messages if "reduce_once_a_step: auto" in line)
    assert "summed over ranks once a step" in first and "every microbatch" in second


def test_what_needs_no_plan_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "card_memory", lambda _: 79 * GIB)
    monkeypatch.setattr(planned, "planned", lambda *_: pytest.fail("planned"))
    alone = Mesh(Degrees(1, 1, 1), None, None, 0, 1)
    for config, mesh, device, expected in (
        (run_config(), MESH, CPU, True),
        (run_config(), alone, CUDA, True),
        (run_config("device_train_microbatch_size=2"), MESH, CUDA, True),
        (run_config("device_train_microbatch_size=auto"), MESH, CUDA, False),  # several once memory has run out
        (run_config("parallel.reduce_once_a_step=false"), MESH, CUDA, False),
        (run_config("parallel.reduce_once_a_step=true"), MESH, CUDA, True),
    ):
        assert planned.settle(config, mesh, device).reduce_once_a_step is expected


def test_what_cannot_be_planned_is_summed_once(
    in_process: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(planned, "card_memory", lambda _: 79 * GIB)
    config = run_config("model.ffn_config.moe_impl=reference")
    assert planned.settle(config, MESH, CUDA).reduce_once_a_step is True
    assert "not planned (the result of" in caplog.text
    monkeypatch.setattr(pickle, "dumps", lambda _: (_ for _ in ()).throw(pickle.PicklingError("a plug-in")))
    assert planned.planned(config, 2, 79 * GIB) == "PicklingError: a plug-in"
