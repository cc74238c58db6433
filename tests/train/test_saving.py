"""What becomes of a save_folder: `latest` against the truth, failed saves, locks, storage that nodes do not share."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from test_run import metrics_of, recipe, snapshot, weights_of  # noqa: F401

from llmfoundry.checkpoint import manifest
from llmfoundry.checkpoint.checkpointer import Checkpointer, CheckpointState, read
from llmfoundry.cli.inference import generate_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError, RunError
from llmfoundry.report.page import write_report
from llmfoundry.train import outputs
from llmfoundry.train.owner import OWNER, Owner
from llmfoundry.train.saving import STALL, Saver
from tests import forks
from tests.full_disk import full_disk

KEEP_ONE = ["save_interval=1ba", "save_num_checkpoints_to_keep=1", "eval_interval=0ba"]
KILL_BEFORE_LATEST = """
import os, signal
from pathlib import Path

real = Path.symlink_to

def symlink_to(self, target, *args, **kwargs):
    if str(target) == os.environ.get("KILL_AT", ""):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target, *args, **kwargs)

Path.symlink_to = symlink_to
"""

# From the fourth step on, weights give no number.
NOT_A_NUMBER = """
import torch

from llmfoundry.train.callback import Callback, CallbackConfig

class Break(Callback):
    def step_end(self, trainer, metrics):
        if trainer.state.step == 4:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("nan"))

class BreakConfig(CallbackConfig, names=("breaks",)):
    def build(self):
        return Break()
"""


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def copied(run: Path, to: Path) -> Path:
    """As `cp -rL` and `aws s3 sync` copy: links become what they point to."""
    return Path(shutil.copytree(run, to, symlinks=False))


@pytest.mark.parametrize("also", ["newer", "alone", "stale"])
def test_a_latest_that_became_a_folder_is_no_obstacle(recipe: Path, tmp_path: Path, also: str) -> None:  # noqa: F811
    assert train_main([str(recipe), *KEEP_ONE, "max_duration=3ba"]) == 0
    run = copied(tmp_path / "run", tmp_path / "copy")
    assert not (run / "checkpoints" / "latest").is_symlink()
    if also == "alone":  # only what `latest` had pointed to was copied
        shutil.rmtree(run / "checkpoints" / "step-3")
    if also == "stale":  # an earlier copy's, of other content
        manifest_file = run / "checkpoints" / "latest" / "MANIFEST.json"
        manifest_file.write_text(json.dumps(json.loads(manifest_file.read_text()) | {"step": 2}))
    assert read(run).step == 3
    go_on = [str(recipe), *KEEP_ONE, f"save_folder={run}", "autoresume=true"]
    assert train_main([*go_on, "max_duration=6ba"]) == 0
    assert names(run) == {"latest", "step-6"} and (run / "checkpoints" / "latest").readlink() == Path("step-6")
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_repairs_a_copied_latest(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    options = [str(recipe), *KEEP_ONE, "max_duration=3ba", "autoresume=true"]
    assert train_main(options) == 0
    run = copied(tmp_path / "run", tmp_path / "copy")
    assert train_main([*options, f"save_folder={run}"]) == 0
    assert names(run) == {"latest", "step-3"} and (run / "checkpoints" / "latest").is_symlink()


def test_a_latest_that_is_no_checkpoint_is_left_and_nothing_else_stops(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "run" / "checkpoints" / "latest").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest" / "mine").touch()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text())))
    assert train_main([str(recipe), *KEEP_ONE, "max_duration=3ba", "autoresume=true"]) == 0
    assert names(tmp_path / "run") == {"latest", "step-3"}
    assert "latest is a folder and not a checkpoint; remove it" in caplog.text


def test_the_next_start_makes_up_for_a_kill_before_latest_moved(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    plug_in = tmp_path / "kills.py"
    plug_in.write_text(KILL_BEFORE_LATEST)
    options = [str(recipe), *KEEP_ONE, "max_duration=3ba", "autoresume=true"]
    script = "import sys; from llmfoundry.cli.train import train_main; sys.exit(train_main())"
    killed = forks.run("-c", script, *options, f"code_paths=[{plug_in}]", env=os.environ | {"KILL_AT": "step-3"})
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    assert names(run) == {"latest", "step-2", "step-3"} and (run / "checkpoints" / "latest").readlink() == Path(
        "step-2"
    )
    (run / "checkpoints" / "step-3.tmp-0123456789ab").mkdir()
    assert read(run / "checkpoints" / "latest").step == read(run).step == 3
    assert generate_main(["--checkpoint", str(run), "--prompt", "1", "--max-new-tokens", "2", "--allow-code"]) == 0
    assert train_main(options) == 0
    assert names(run) == {"latest", "step-3"} and (run / "checkpoints" / "latest").readlink() == Path("step-3")
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3]


def test_a_duty_that_fails_does_not_keep_the_next_from_being_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_links(self: Path, target: object) -> None:
        raise OSError(errno.EPERM, "this file system has no links")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    checkpointer = Checkpointer(tmp_path, keep=1)
    model = torch.nn.Linear(2, 2)
    for step in (1, 2):
        checkpointer.save(CheckpointState(step=step, model=model))
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert "this file system has no links" in caplog.text


@pytest.mark.parametrize("part", ["model", "tokenizer", "config"])
def test_generation_falls_back_where_the_newest_checkpoint_is_damaged(
    recipe: Path, tmp_path: Path, part: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert train_main([str(recipe), "max_duration=2ba", "save_interval=1ba", "eval_interval=0ba"]) == 0
    newest = tmp_path / "run" / "checkpoints" / "step-2"
    file = {"model": newest / "model-00000.safetensors", "tokenizer": newest / "tokenizer" / "tokenizer.json",
            "config": newest / "config.yaml"}[part]  # fmt: skip
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    ask = ["--prompt", "1 plus", "--max-new-tokens", "4"]
    capsys.readouterr()
    texts = []
    for source in ("run", "run/checkpoints/latest", "run/checkpoints/step-1"):
        assert generate_main(["--checkpoint", str(tmp_path / source), *ask]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1 and caplog.text.count("SKIPPING A DAMAGED CHECKPOINT") == 2
    assert generate_main(["--checkpoint", str(newest), *ask]) == 2, "a checkpoint that is named is that one"
    assert file.name in capsys.readouterr().err


# Saves that fail


def full() -> Callable[[], None]:
    """No file may grow beyond 3,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))


def failing() -> Callable[[], None]:
    """The disk takes what is written, and fails when it is to last."""
    real = os.fsync

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.fsync = fsync
    return partial(setattr, os, "fsync", real)


def forbidden(folder: Path) -> Callable[[], None]:
    """Nothing may be made in a folder; root, whom no permission stops, becomes another user."""
    folder.chmod(0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)

    def give_back() -> None:
        os.seteuid(user)
        folder.chmod(0o700)

    return give_back


def gone(folder: Path) -> Callable[[], None]:
    """The folder is away, and comes back."""
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    return partial(elsewhere.rename, folder)


class Lost:
    """Some saves, by their number, cannot be written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: set[int], lose: Callable[[], Callable[[], None]]) -> None:
        real, self.saves = Saver._begin, 0

        def begin(saver: Saver, state: CheckpointState, sync: Callable[[], None]) -> bool:
            self.saves += 1
            give_back = lose() if self.saves in when else lambda: None
            try:
                done = real(saver, state, sync)
                if saver.checkpointer._pending is not None:
                    saver.checkpointer._pending.exception()
                return done
            finally:
                give_back()

        monkeypatch.setattr(Saver, "_begin", begin)


EACH_STEP = ["save_interval=1ba", "eval_interval=0ba", "max_duration=6ba"]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.parametrize("fault", ["full", "failing", "forbidden", "gone"])
def test_a_run_outlives_failed_saves(
    recipe: Path, tmp_path: Path, asynchronous: str, fault: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    faults = {"full": full, "failing": failing, "forbidden": partial(forbidden, tmp_path / "run" / "checkpoints"),
              "gone": partial(gone, tmp_path / "run")}  # fmt: skip
    Lost(monkeypatch, {2, 3, 5}, faults[fault])
    assert train_main([str(recipe), *EACH_STEP, f"save_async={asynchronous}"]) == 0
    assert names(tmp_path / "run") == {"latest", "step-1", "step-4", "step-6"}
    assert "saving failed (2 in a row, 3 allowed): " in caplog.text
    reason = {"full": "File too large", "failing": "Input/output error", "forbidden": "Permission denied",
              "gone": "No such file or directory"}  # fmt: skip
    assert reason[fault] in caplog.text
    assert f"the newest checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-1'}" in caplog.text
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [STALL in line for line in lines] == [False, *[True] * 5], "of the save before the step"


def test_a_folder_that_another_took_the_place_of_is_not_written_to(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    def replaced() -> Callable[[], None]:
        (tmp_path / "run").rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", tmp_path / "run", symlinks=True)
        return lambda: None

    Lost(monkeypatch, {2}, replaced)
    assert train_main([str(recipe), *EACH_STEP, "save_failures_allowed=1"]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run'} is another folder than the run began in; move that one back" in error
    assert names(tmp_path / "run") == names(tmp_path / "moved") == {"latest", "step-1"}


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_too_many_failed_saves_in_a_row_end_the_run(
    recipe: Path, tmp_path: Path, asynchronous: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Lost(monkeypatch, {2, 3, 4, 5, 6}, full)
    options = [*EACH_STEP, "max_duration=9ba", "save_failures_allowed=2", f"save_async={asynchronous}"]
    assert train_main([str(recipe), *options]) == 1
    error = capsys.readouterr().err
    assert "3 saves in a row have failed (save_failures_allowed=2)" in error and "step-1" in error
    assert "Traceback" not in error
    assert names(tmp_path / "run") == {"latest", "step-1"}
    assert train_main([str(recipe), *options, "autoresume=true"]) == 0


@pytest.mark.parametrize(("lost", "code"), [({1}, 0), ({1, 2}, 1)])
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_the_last_save_is_tried_twice_and_then_an_error(
    recipe: Path, tmp_path: Path, lost: set[int], code: int, asynchronous: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Lost(monkeypatch, lost, full)
    options = ["save_interval=0ba", "max_duration=2ba", "eval_interval=0ba", f"save_async={asynchronous}"]
    assert train_main([str(recipe), *options]) == code
    assert ("the last checkpoint, of step 2, could not be saved" in capsys.readouterr().err) == bool(code)
    assert (tmp_path / "run" / "checkpoints" / "step-2").exists() != bool(code)


# Which checkpoints are kept


def test_each_multiple_of_keep_every_is_saved_and_kept_beside_the_newest(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ["save_interval=3ba", "keep_every=4ba", "save_num_checkpoints_to_keep=2", "eval_interval=0ba"]
    assert train_main([str(recipe), *options, "max_duration=11ba"]) == 0
    assert names(tmp_path / "run") == {"latest", "step-4", "step-8", "step-9", "step-11"}
    assert train_main([str(recipe), *options, "max_duration=14ba", "autoresume=true"]) == 0
    assert names(tmp_path / "run") == {"latest", "step-4", "step-8", "step-12", "step-14"}


def test_weights_that_are_not_finite_push_no_good_checkpoint_out(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "breaks.py").write_text(NOT_A_NUMBER)
    options = ["save_interval=1ba", "save_num_checkpoints_to_keep=2", "eval_interval=0ba", "max_duration=8ba"]
    broken = [f"code_paths=[{tmp_path / 'breaks.py'}]", "callbacks.breaks={}", "max_skipped_steps=3"]
    assert train_main([str(recipe), *options, *broken]) == 1
    assert names(tmp_path / "run") == {"latest", "step-2", "step-3"}
    assert train_main([str(recipe), *options, "autoresume=true"]) == 0
    assert names(tmp_path / "run") == {"latest", "step-7", "step-8"}


def test_metrics_that_cannot_be_written_are_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = outputs.RunFolder.claim(tmp_path)
    folder.open_metrics(0)
    with full_disk(30):
        for step in (1, 2, 3, 4):
            folder.write_metrics({"step": step, "loss": 0.5})
        with pytest.raises(OSError, match="File too large"):
            folder.sync()
    assert caplog.text.count("cannot be written: File too large; trying again") == 1
    folder.write_metrics({"step": 5, "loss": 0.5})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
    ]


@pytest.mark.parametrize("file", ["config.yaml", "summary.json", OWNER, "report.html"])
def test_what_does_not_fit_on_the_disk_leaves_nothing_half_written(tmp_path: Path, file: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    folder = outputs.RunFolder(tmp_path, (tmp_path / ".lock").open("w"), locked=True)
    owner = Owner(str(tmp_path), None)
    writes: dict[str, Callable[[], object]] = {
        "config.yaml": lambda: folder.begin({"run_name": "a" * 100}, None, 0),
        "summary.json": lambda: folder.write_summary({"why": "a" * 100}),
        OWNER: owner.take,
        "report.html": lambda: write_report([tmp_path], tmp_path / "report.html"),
    }
    with full_disk(30):
        with pytest.raises((ConfigError, RunError, OSError), match="File too large") as error:
            writes[file]()
    assert file == "report.html" or str(tmp_path) in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "metrics.jsonl"}


# Locks and shared storage


def test_a_folder_in_use_is_refused_and_one_that_cannot_be_locked_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = outputs.RunFolder.claim(tmp_path)
    with pytest.raises(ConfigError, match="is in use by another run"):
        outputs.RunFolder.claim(tmp_path)

    def fails(number: int) -> None:
        def flock(handle: object, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    for number in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
        fails(number)
        caplog.clear()
        outputs.RunFolder.claim(tmp_path)
        assert f"cannot be locked ({os.strerror(number)})" in caplog.text
    fails(errno.EACCES)
    with pytest.raises(ConfigError, match="is in use by another run"):
        outputs.RunFolder.claim(tmp_path)
    assert held.path == tmp_path


def _look(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    outputs._PROBE_SECONDS = 0.2
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in ("shared", "a" if rank == 0 else "b"):
        (folder / name).mkdir(exist_ok=True)
        dist.barrier()
        try:
            outputs.check_shared(folder / name)
            (folder / f"{name}-{rank}").write_text("shared")
        except ConfigError as error:
            (folder / f"{name}-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.dist
def test_nodes_that_do_not_share_a_folder_are_named(tmp_path: Path) -> None:
    forks.in_processes(_look, (tmp_path,), 2)
    assert (tmp_path / "shared-0").read_text() == (tmp_path / "shared-1").read_text() == "shared"
    for file in ("a-0", "b-1"):
        assert "(rank 1) is not the folder that rank 0 writes to; put it on storage" in (tmp_path / file).read_text()
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "shared").iterdir())


# Stopping


def test_a_stopped_run_says_where_it_saved_and_the_command_that_continues(
    recipe: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    started = forks.start("scripts/train.py", str(recipe), "max_duration=1000ba", "eval_interval=0ba", cwd=root)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while started.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        time.sleep(0.002)
    started.send_signal(signal.SIGINT)
    error, _ = started.communicate(timeout=60)
    assert started.returncode == 0, error
    assert f"Ctrl-C: finishing this step, then saving to {tmp_path / 'run'}" in error
    (line,) = (line for line in error.splitlines() if line.startswith("stopped at step "))
    step, _, rest = line.removeprefix("stopped at step ").partition("; saved to ")
    folder, _, again = rest.partition("; to continue: ")
    assert folder == str(tmp_path / "run" / "checkpoints" / f"step-{step}")
    done = subprocess.run(f"{again} max_duration={int(step) + 1}ba", shell=True, cwd=root, check=True)
    assert done.returncode == 0 and metrics_of(tmp_path / "run")[-1]["step"] == int(step) + 1


@pytest.mark.parametrize("keep", ["newest", "both"])
def test_a_checkpoint_of_a_run_that_still_saves_is_taken_whole(tmp_path: Path, keep: str) -> None:
    """`latest` moves on between looking at a checkpoint and loading it."""
    model, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    saver = Checkpointer(tmp_path, keep=-1)
    saver.save(CheckpointState(step=1, model=model, trainer={"of": 1}))
    contents = read(tmp_path / "latest", "everything")
    torch.nn.init.zeros_(model.weight)
    saver.save(CheckpointState(step=2, model=model, trainer={"of": 2}))
    if keep == "newest":
        manifest.remove(tmp_path / "step-1")
        before = other.weight.detach().clone()
        with pytest.raises(ConfigError, match="step-1"):
            Checkpointer(tmp_path).load(contents, CheckpointState(step=0, model=other))
        assert torch.equal(other.weight, before)
    else:
        assert Checkpointer(tmp_path).load(contents, CheckpointState(step=0, model=other))["of"] == 1
        assert other.weight.abs().max() > 0
