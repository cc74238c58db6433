"""Bad numbers and a slow host on one rank of two: all ranks act alike, and the rank is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.runs import ended, is_saved, leftovers, metrics, plug_in, recipe, start

pytestmark = [pytest.mark.dist, pytest.mark.slow]
ON_RANK_1 = """
import time
import torch
from llmfoundry import runtime
from llmfoundry.data.loader import Loader
from llmfoundry.train import loss, trainer

rank, steps = runtime.rank(), [0]
gather, forward, train_step = Loader.gather, loss.forward, trainer.train_step

def slow_gather(self, rows):
    time.sleep(0.2 * rank)
    return gather(self, rows)

def forward_with_infinite_row(model, batch, by_token=False):
    out = forward(model, batch, by_token)
    if rank == 1 and steps[0] == 3:
        scale = torch.tensor([1.0, float("inf")])[:, None]
        out = out._replace(nats=out.nats * scale, loss_sum=out.loss_sum * float("inf"))
    return out

def step_with_nan(model, *rest, **more):
    steps[0] += 1
    result = train_step(model, *rest, **more)
    if rank == 1 and steps[0] == 6:
        model.blocks[0].ffn.experts.w1._local_tensor.data.view(-1)[0] = float("nan")
    return result

Loader.gather, loss.forward, trainer.train_step = slow_gather, forward_with_infinite_row, step_with_nan
"""


def test_all_ranks_act_alike_on_what_one_of_them_meets(tmp_path: Path) -> None:
    more = plug_in(tmp_path, ON_RANK_1) | {
        "parallel": {"expert": 2}, "callbacks": {"slow_ranks": {"interval": "2ba"}},
        "save_interval": "1ba", "save_num_checkpoints_to_keep": 2, "device_train_microbatch_size": 2,
    }  # fmt: skip
    output = ended(start(recipe(tmp_path, **more), ranks=2), 1)
    run = tmp_path / "run"
    (line,) = (run / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["rows"] == [8, 11] and json.loads(line)["not_finite"] == [{"row": 11, "rank": 1}], output
    assert "step 6: blocks.0.ffn.experts.w1 has values that are not finite" in output
    assert [is_saved(run, step) for step in range(1, 7)] == [False, False, False, True, True, False]
    assert leftovers(run) == []
    assert [line["skipped_steps"] for line in metrics(run)] == [0, 0, 1, 1, 1, 1]
    assert all(line["time/ranks/latest"] == 1 for line in metrics(run) if "time/ranks/latest" in line)
    assert "rank 1 starts its steps 0." in output, "its data is slow, and the others wait"
