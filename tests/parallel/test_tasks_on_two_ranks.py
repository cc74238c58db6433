"""Evaluation by tasks with sharded weights and divided experts: the same scores as in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from llmfoundry import runtime
from llmfoundry.config import Config, check
from llmfoundry.data.tokenizer import PLAIN_TEXT
from llmfoundry.eval.icl import build_tasks, evaluate_tasks, with_tasks_read
from llmfoundry.eval.icl_questions import Reader
from llmfoundry.eval.icl_tasks import TaskConfig
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh
from tests.eval import tasks as small


class File(Config):
    """The part of a YAML that is tested here."""

    icl_tasks: list[TaskConfig]


def _scores(experts: int, folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = small.tokenizer()
    made = small.model(len(tokenizer))
    parallel = ParallelConfig(expert=experts if runtime.world_size() > 1 else 1, compile=False)
    mesh = build_mesh(parallel, "cpu", 4)
    with torch.device("meta"):
        shell = made.config.build()
    shell = materialize(parallelize(shell, mesh, parallel, "fp32"), parallel, seed=1).eval()
    configs = check(File, with_tasks_read({"icl_tasks": small.write_tasks(Path(folder))}, Path(folder))).icl_tasks
    tasks = build_tasks(configs, Reader(tokenizer, PLAIN_TEXT), max_seq_len=200, batch_size=8, max_batches=2)
    scores = evaluate_tasks(shell, tasks, rank=mesh.data_rank, world=mesh.data_ranks)
    assert scores is not None
    out = Path(folder) / f"{runtime.world_size()}-{runtime.rank()}.json"
    out.write_text(json.dumps({name: score.value for name, score in scores.items()}))


@pytest.mark.dist
def test_scores_are_the_same_on_one_rank_and_with_experts_on_two(tmp_path: Path) -> None:
    run_ranks([2, 1], _scores, 2, str(tmp_path))
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert len(one) > 10 and two == [one, one]
