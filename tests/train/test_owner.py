"""Two runs on two machines that share a `save_folder`: one of them has it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import fsspec
import pytest

from llmfoundry.checkpoint.manifest import TakenOver
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError
from llmfoundry.train import owner
from llmfoundry.train.owner import OWNER, Owner
from tests.train.test_run import metrics_of, recipe  # noqa: F401

PLACES = ["disk", "store"]


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT", 0.05)
    monkeypatch.setattr(owner, "LEASE", 0.5)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else f"memory://{tmp_path}"


def record(place: str) -> dict[str, object] | None:
    fs, path = fsspec.core.url_to_fs(f"{place}/{OWNER}")
    return json.loads(fs.cat_file(path)) if fs.exists(path) else None


def test_the_second_run_ends_while_the_first_goes_on(place: str) -> None:
    first, second = Owner(place, None), Owner(place, None)
    first.take()
    with pytest.raises(ConfigError, match=f"save_folder: {place} is in use by another run, on .*, which is still"):
        second.take()
    second.close()
    first.check()
    first.close()
    assert record(place) is None


def test_a_dead_owner_is_followed_and_finds_that_out_if_it_was_not_dead(place: str) -> None:
    first, second = Owner(place, None), Owner(place, None)
    first.take()
    first._closed.set()  # its machine sleeps
    first._thread.join()
    second.take()
    with pytest.raises(TakenOver, match=f"{place} was taken over by a run on .*; this one ends, and saves nothing"):
        first.check()
    first.close()
    second.check()
    second.close()
    assert record(place) is None


def test_within_a_machine_the_lock_tells_at_once_that_the_owner_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "LEASE", 600.0)
    with (tmp_path / ".lock").open("w") as lock:
        Owner(str(tmp_path), lock).take()
        again = Owner(str(tmp_path), lock)
        begun = time.monotonic()
        again.take()
        assert time.monotonic() - begun < 60
        again.close()


def test_a_run_whose_folder_was_taken_over_ends_with_one_line_and_completes_no_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(owner, "BEAT", 600.0)
    file = tmp_path / "taken.py"
    file.write_text(
        "import json\n"
        "from llmfoundry.train.callback import Callback, CallbackConfig\n"
        "class Taken(Callback):\n"
        "    def step_end(self, trainer, metrics):\n"
        "        if trainer.state.step == 3:\n"
        f"            (trainer.config.folder / '{OWNER}').write_text(json.dumps("
        "dict(nonce='other', host='elsewhere', lock='', beat=1)))\n"
        "class TakenConfig(CallbackConfig, names=('taken',)):\n"
        "    def build(self):\n"
        "        return Taken()\n"
    )
    words = ["max_duration=6ba", "save_interval=2ba", f"code_paths=[{file}]", "callbacks={taken: {}}"]
    assert train_main([str(recipe), *words]) == 1
    said = capsys.readouterr().err
    assert "was taken over by a run on elsewhere" in said and "Traceback" not in said
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-2"]
    assert len(metrics_of(run)) == 4 and record(str(run))["nonce"] == "other"  # type: ignore[index]
