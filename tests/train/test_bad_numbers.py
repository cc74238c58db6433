"""Numbers that are not finite, and losses that jump: what is skipped, recorded and saved, and when a run gives up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmfoundry import runtime
from llmfoundry.checkpoint.checkpointer import Checkpointer, CheckpointState
from llmfoundry.checkpoint.reading import read
from llmfoundry.cli.data import data_main
from llmfoundry.cli.train import train_main
from llmfoundry.data.loader import Batch
from llmfoundry.model.transformer import CausalLM, Output
from llmfoundry.train import loss, trainer
from llmfoundry.train.bad_numbers import first_not_finite
from tests.callbacks.conftest import lines, tiny  # noqa: F401

OFFSET = runtime.seed_of("noise", 17) // 2  # a step adds it to the numbers of its rows
EACH_STEP = ["eval_interval=0ba", "save_interval=1ba", "autoresume=true"]


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()} - {"latest"}


def skipped(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


def with_factor(monkeypatch: pytest.MonkeyPatch, factor: float, rows: Callable[[int], bool]) -> None:
    """Multiply the loss of some rows, by their numbers in the run."""
    real = loss.forward

    def forward(model: CausalLM, batch: Batch, by_token: bool = False) -> Output:
        out = real(model, batch, by_token)
        numbers = [row - OFFSET if row >= OFFSET else row for row in batch.rows.tolist()]
        scale = torch.tensor([factor if rows(number) else 1.0 for number in numbers])
        assert out.nats is not None and out.loss_sum is not None
        nats = out.nats * scale[:, None]
        return out._replace(nats=nats, loss_sum=out.loss_sum * (nats.detach().sum() / out.nats.detach().sum()))

    monkeypatch.setattr(loss, "forward", forward)


def nan_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """One weight becomes NaN after the update of a step, as a bad kernel or memory would do it."""
    real, calls = trainer.train_step, iter(range(1, 1000))

    def train_step(model: CausalLM, *rest: object, **more: object) -> object:
        result = real(model, *rest, **more)  # type: ignore[arg-type]
        if next(calls) == step:
            model.blocks[1].ffn.experts.w2.data.view(-1)[5] = float("nan")  # type: ignore[union-attr]
        return result

    monkeypatch.setattr(trainer, "train_step", train_step)


@pytest.mark.parametrize(("interval", "step"), [("1ba", 3), ("0ba", 4)])
def test_a_weight_that_is_nan_ends_the_run_by_its_name_and_is_never_saved(
    tiny: Path, tmp_path: Path, interval: str, step: int,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    nan_after(monkeypatch, 3)
    command = [str(tiny), *EACH_STEP, f"save_interval={interval}", "save_num_checkpoints_to_keep=1"]
    assert train_main([*command, "max_duration=9ba"]) == 1
    error = capsys.readouterr().err
    assert f"error: step {step}: blocks.1.ffn.experts.w2 has values that are not finite" in error
    assert "Traceback" not in error
    if interval == "0ba":
        assert not (tmp_path / "run" / "checkpoints").exists()
        return
    assert names(tmp_path / "run") == {"step-2"}
    monkeypatch.undo()
    assert train_main([*command, "max_duration=5ba"]) == 0, "it goes on from the last good one"
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_nan_in_the_very_last_update_is_no_success(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    nan_after(monkeypatch, 4)
    assert train_main([str(tiny), *EACH_STEP, "save_interval=2ba"]) == 1
    assert names(tmp_path / "run") == {"step-2"} and not (tmp_path / "run" / "summary.json").exists()


def test_what_is_not_finite_is_found_in_any_dtype_and_place() -> None:
    fine = {"ids": torch.tensor([2**40]), "empty": torch.zeros(0), "half": torch.ones(3, dtype=torch.bfloat16)}
    assert first_not_finite(fine) is None
    later = torch.ones(2, 2, dtype=torch.float64)
    later[1, 1] = -float("inf")
    assert first_not_finite(fine | {"a": later, "b": later}) == "a"
    assert first_not_finite({"big": torch.full((2,), 3e38)}) is None, "large is not infinite"


def test_the_rows_of_a_skipped_batch_are_on_record_and_can_be_read(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    with_factor(monkeypatch, float("inf"), lambda row: row == 9)
    assert train_main([str(tiny), *EACH_STEP]) == 0
    run = tmp_path / "run"
    why = "the gradient is not finite"
    assert skipped(run) == [{"step": 3, "why": why, "rows": [8, 11], "not_finite": [{"row": 9, "rank": 0}]}]
    assert [line["skipped_steps"] for line in lines(run)] == [0, 0, 1, 1]
    assert names(run) == {"step-1", "step-2", "step-4"}, "nothing is saved in doubt; it is made up for"
    capsys.readouterr()
    assert data_main(["show", str(run), "--row", "9", "10", "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["row"] for each in shown] == [9, 10]
    assert data_main(["show", str(run), "--row", "9"]) == 0
    assert capsys.readouterr().out.startswith("--- row 9: ")
    assert data_main(["show", str(tiny), "--row", "9"]) == 2


def test_a_run_that_gave_up_goes_on_behind_the_rows_when_it_is_started_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    with_factor(monkeypatch, float("inf"), lambda row: 8 <= row < 20)
    command = [str(tiny), *EACH_STEP, "max_duration=8ba", "save_num_checkpoints_to_keep=1", "max_skipped_steps=2"]
    command += ["max_skipped_share=0.5"]
    run = tmp_path / "run"
    assert train_main(command) == 1
    said = "step 5: 3 steps in a row were skipped (max_skipped_steps=2); the same command continues after their rows"
    assert said in capsys.readouterr().err
    assert names(run) == {"step-2", "step-5"}, "a checkpoint in doubt does not take the place of a good one"
    assert train_main(command) == 0
    assert names(run) == {"step-8"} and [line["step"] for line in lines(run)] == list(range(1, 9))
    assert len(skipped(run)) == 3


def test_a_run_that_only_skips_stops_with_what_to_set_and_does_not_creep_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    with_factor(monkeypatch, float("inf"), lambda row: row >= 8)
    command = [str(tiny), *EACH_STEP, "max_duration=60ba", "max_skipped_steps=2", "max_skipped_share=0.9"]
    assert train_main(command) == 1
    for _ in range(2):
        capsys.readouterr()
        assert train_main(command) == 1
        error = capsys.readouterr().err
        assert "step 8: 6 steps in a row were skipped (max_skipped_steps=2), in two starts" in error
        assert "lower optimizer.lr" in error and "max_skipped_steps" in error
    assert names(tmp_path / "run") == {"step-1", "step-2", "step-5"}


def test_too_many_skipped_steps_are_no_success(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    with_factor(monkeypatch, float("inf"), lambda row: row // 4 % 2 == 1)
    command = [str(tiny), *EACH_STEP, "max_duration=20ba", "max_skipped_steps=1"]
    assert train_main(command) == 1
    assert "step 6: 3 of 6 steps were skipped, more than max_skipped_share=0.1 of all" in capsys.readouterr().err
    assert train_main([*command, "max_skipped_share=0.5"]) == 0


def test_provisional_checkpoints_go_when_a_newer_one_counts(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    model = torch.nn.Linear(2, 2)
    for step in range(1, 7):
        checkpointer.save(CheckpointState(step=step, model=model, kept="for now" if step in (3, 4) else "newest"))
        if step == 4:
            assert {path.name for path in tmp_path.glob("step-*")} == {"step-1", "step-2", "step-4"}
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-5", "step-6"}


SPIKE = "callbacks.loss_spike={{action: {action}, window_size: 8, patience: {patience}}}"


def spiky(action: str, patience: int = 1) -> list[str]:
    return [SPIKE.format(action=action, patience=patience), "max_duration=20ba", "eval_interval=0ba", "autoresume=true"]


def test_a_spike_is_logged(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    with_factor(monkeypatch, 4.0, lambda row: 40 <= row < 44)
    assert train_main([str(tiny), *spiky("log")]) == 0
    (said,) = (record.message for record in caplog.records if "loss_spike" in record.message)
    assert said.startswith("step 11: loss_spike: the loss is ")
    assert not (tmp_path / "run" / "skipped.jsonl").exists()


def test_a_batch_that_makes_a_spike_is_skipped_before_it_changes_a_weight(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    with_factor(monkeypatch, 4.0, lambda row: 40 <= row < 44)
    assert train_main([str(tiny), *spiky("skip"), "save_interval=1ba"]) == 0
    run = tmp_path / "run"
    assert skipped(run) == [{"step": 11, "why": "the loss is too high", "rows": [40, 43], "not_finite": []}]
    assert names(run) == {f"step-{step}" for step in range(1, 21)} - {"step-11"}
    assert lines(run)[-1]["skipped_steps"] == 1
    before = (run / "checkpoints" / "step-10" / "trainer.json").read_text()
    assert len(json.loads(before)["callbacks"]["callbacks.loss_spike"]["window"]) == 8


def test_a_spike_goes_back_to_the_last_checkpoint_and_past_the_data_also_after_a_kill(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    """The rows of steps 11 and 12 make a spike; the checkpoint before it is of step 9."""
    with_factor(monkeypatch, 4.0, lambda row: 40 <= row < 48)
    command = [str(tiny), *spiky("roll_back", patience=2), "save_interval=3ba"]
    assert train_main(command) == 0
    run = tmp_path / "run"
    (record,) = skipped(run)
    assert record["rows"] == [36, 47] and record["step"] == 9 and "step 12: loss_spike" in str(record["why"])
    assert [line["step"] for line in lines(run)] == list(range(1, 21)), "each step once"
    assert max(line["loss/train/ce"] for line in lines(run)) < 10.0, "no step of the spike is left"
    state = read(run).trainer["state"]
    assert isinstance(state, dict) and (state["step"], state["rows"]) == (20, 4 * 20 + 12)
    assert f"back to {run / 'checkpoints' / 'step-9'} and continuing after row 47" in caplog.text
    curve = [line["loss/train/ce"] for line in lines(run)]

    # The same from a checkpoint before the spike: what the detector has seen is in it.
    for step in range(12, 21):
        for path in (run / "checkpoints").glob(f"step-{step}"):
            path.rename(tmp_path / path.name)
    assert train_main(command) == 0
    assert [line["loss/train/ce"] for line in lines(run)] == curve


def test_a_run_that_only_goes_back_ends(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    with_factor(monkeypatch, 4.0, lambda row: row >= 40)
    assert train_main([str(tiny), *spiky("roll_back"), "save_interval=3ba"]) == 1
    assert "after 3 times back (max_rollbacks): other rows do not help" in capsys.readouterr().err
