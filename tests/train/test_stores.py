"""A run whose save_folder is in a store: what goes there, what half an upload is, and going on from there elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from test_run import metrics_of, recipe, written  # noqa: F401

from llmfoundry.checkpoint.checkpointer import read
from llmfoundry.cli.convert import convert_main
from llmfoundry.cli.inference import eval_main, generate_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError
from llmfoundry.data import remote
from llmfoundry.train import owner
from tests import forks
from tests.stores import Door, Fault, s3

SHORT = ["eval_interval=0ba", "save_interval=2ba", "max_duration=6ba", "scheduler.t_max=8ba"]
KINDS = ["memory", "file", "s3"]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine keeps what it fetches and what is on its way."""
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "machine"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    return tmp_path / "machine"


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A save_folder in a store, by the kind of store that a test asks for; else in memory."""
    kind = getattr(request, "param", "memory")
    if kind == "file":
        yield f"file://{tmp_path}/store/run"
    elif kind == "s3":
        with s3(monkeypatch, "bucket"):
            yield "s3://bucket/runs/run"
    else:
        yield "kept://bucket/run"
        if fsspec.filesystem("kept").exists("/bucket"):
            fsspec.filesystem("kept").rm("/bucket", recursive=True)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """An S3 server that can fail."""
    with s3(monkeypatch, "bucket") as door:
        yield door


def tree(url: str) -> set[str]:
    """The names of all files below a URL."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name.removeprefix(path).removeprefix("/") for name in fs.find(path)}


def steps(url: str) -> set[str]:
    return {name.split("/")[1] for name in tree(url) if name.startswith("checkpoints/")}


def copied(url: str, to: Path) -> Path:
    """A folder of this machine that holds what a URL does."""
    fs, path = fsspec.core.url_to_fs(url)
    for name in tree(url):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(f"{path}/{name}", str(to / name))
    return to


def losses(folder: Path) -> list[tuple[object, ...]]:
    return [(line["step"], line["loss/train/ce"], line["grad_norm"]) for line in metrics_of(folder)]


def same_end(one: Path, other: Path) -> bool:
    """Whether two runs have the same curve and the same last tensors, bit by bit."""
    (a, b) = ([load_file(file) for file in sorted((run / "checkpoints" / "step-6").glob("[mo]*.safetensors"))]
              for run in (one, other))  # fmt: skip
    tensors = all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x | y)
    return losses(one) == losses(other) and len(a) == 2 and tensors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train_main([str(written(folder)), *SHORT]) == 0
    return folder / "run"


@pytest.mark.parametrize("url", KINDS, indirect=True)
def test_a_run_goes_on_from_a_store_on_a_machine_that_has_nothing(
    recipe: Path, tmp_path: Path, machine: Path, undisturbed: Path, url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    to_store = [str(recipe), *SHORT, f"save_folder={url}"]
    assert train_main([*to_store, "max_duration=4ba"]) == 0
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html"} <= tree(url)
    assert steps(url) == {"step-2", "step-4"}
    assert not list((machine / "runs").rglob("*.safetensors")), "nothing stays here that the store has"
    assert train_main(to_store) == 2
    assert (
        f"{url} is already used; choose another, or continue that run with autoresume=true" in capsys.readouterr().err
    )
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "another"))
    assert train_main([*to_store, "autoresume=true"]) == 0
    assert steps(url) == {"step-2", "step-4", "step-6"}
    assert same_end(copied(url, tmp_path / "copy"), undisturbed)
    before = tree(url)
    assert train_main([*to_store, "autoresume=true"]) == 0, "already complete"
    assert tree(url) == before


@pytest.mark.parametrize("url", ["memory", "s3"], indirect=True)
def test_what_is_saved_in_a_store_is_used_by_its_url(
    recipe: Path, tmp_path: Path, machine: Path, undisturbed: Path, url: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fs, path = fsspec.core.url_to_fs(url)
    for file in filter(Path.is_file, undisturbed.rglob("*")):
        if "latest" not in file.parts:
            fs.makedirs(os.path.dirname(f"{path}/{file.relative_to(undisturbed)}"), exist_ok=True)
            fs.put_file(str(file), f"{path}/{file.relative_to(undisturbed)}")
    texts = []
    for source in (str(undisturbed), url, f"{url}/checkpoints/latest", f"{url}/checkpoints/step-6"):
        capsys.readouterr()
        assert generate_main(["--checkpoint", source, "--prompt", "1 plus", "--max-new-tokens", "4"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert len(list(machine.rglob("model-*.safetensors"))) == 1, "fetched once"
    assert not list(machine.rglob("optimizer-*.safetensors")), "and no more than is needed"
    assert eval_main(["--checkpoint", url]) == 0
    assert convert_main(["to-hf", url, str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    other = [str(recipe), *SHORT, "max_duration=8ba", f"save_folder={tmp_path / 'other'}"]
    assert train_main([*other, f"load_path={url}/checkpoints/step-4"]) == 0
    assert losses(tmp_path / "other")[:2] == losses(undisturbed)[4:]
    assert train_main([*other, f"load_path={url}/nowhere", f"save_folder={tmp_path / 'none'}"]) == 2
    assert f"{url}/nowhere: no such folder" in capsys.readouterr().err


def test_the_store_keeps_what_the_run_is_to_keep(recipe: Path, url: str) -> None:  # noqa: F811
    options = ["save_interval=1ba", "keep_every=2ba", "save_num_checkpoints_to_keep=2", f"save_folder={url}"]
    assert train_main([str(recipe), *SHORT, *options, "max_duration=5ba"]) == 0
    assert steps(url) == {"step-2", "step-4", "step-5"}
    assert train_main([str(recipe), *SHORT, *options, "max_duration=7ba", "autoresume=true"]) == 0
    assert steps(url) == {"step-2", "step-4", "step-6", "step-7"}


def test_half_an_upload_is_no_checkpoint_and_is_cleared_away(
    recipe: Path, tmp_path: Path, undisturbed: Path, url: str, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    to_store = [str(recipe), *SHORT, f"save_folder={url}"]
    assert train_main([*to_store, "max_duration=4ba"]) == 0
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{path}/checkpoints/step-4/MANIFEST.json")
    fs.pipe_file(f"{path}/checkpoints/step-4/model-00007.safetensors", b"of a run with more ranks")
    assert read(url).step == 2
    with pytest.raises(ConfigError, match="step-4: is half an upload"):
        read(f"{url}/checkpoints/step-4")
    assert train_main([*to_store, "autoresume=true"]) == 0
    assert "checkpoints/step-4/model-00007.safetensors" not in tree(url)
    assert same_end(copied(url, tmp_path / "copy"), undisturbed)


@pytest.mark.parametrize("part", ["model-00000.safetensors", "trainer.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_in_a_store_is_passed_over(
    recipe: Path, url: str, part: str, how: str, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    assert train_main([str(recipe), *SHORT, "max_duration=4ba", f"save_folder={url}"]) == 0
    fs, path = fsspec.core.url_to_fs(url)
    file = f"{path}/checkpoints/step-4/{part}"
    data = bytearray(fs.cat_file(file))
    data[-2] ^= 1
    if how == "gone":
        fs.rm_file(file)
    else:
        fs.pipe_file(file, bytes(data if how == "flipped" else data[:-3]))
    assert read(url).step == 2
    assert "SKIPPING A DAMAGED CHECKPOINT: " in caplog.text and f"{url}/checkpoints/step-4/{part}" in caplog.text


# A store that fails


class Failing:
    """A store in memory that is not to be reached while `when` says so, of the number of the file that is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: Callable[[str], bool]) -> None:
        fs = type(fsspec.filesystem("kept"))
        real = fs.put_file

        def put_file(store: object, here: str, there: str, **keys: object) -> None:
            if when(there):
                raise ConnectionError("the store is not to be reached")
            real(store, here, there, **keys)

        monkeypatch.setattr(fs, "put_file", put_file)


def test_a_store_that_fails_is_tried_again_and_the_run_goes_on(
    recipe: Path, tmp_path: Path, undisturbed: Path, machine: Path, url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tries: list[str] = []

    def fails(there: str) -> bool:
        tries.append(there)
        return "step-4/model" in there or ("step-2/model" in there and tries.count(there) < 3)

    Failing(monkeypatch, fails)
    assert train_main([str(recipe), *SHORT, f"save_folder={url}"]) == 0
    assert sum("step-4/model" in each for each in tries) == remote.ATTEMPTS
    assert "step 4 could not be uploaded to kept://bucket/run: " in caplog.text
    assert steps(url) == {"step-2", "step-6"}, "nor is there half an upload"
    assert read(url).step == 6 and not list((machine / "runs").rglob("*.safetensors"))
    assert same_end(copied(url, tmp_path / "copy"), undisturbed)


def test_a_run_that_cannot_upload_stops_and_goes_on_from_what_is_here(
    recipe: Path, tmp_path: Path, undisturbed: Path, machine: Path, url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    to_store = [str(recipe), *SHORT, f"save_folder={url}", "save_interval=1ba", "autoresume=true"]
    with monkeypatch.context() as patched:
        Failing(patched, lambda there: "step-3" in there or "step-4" in there)
        assert train_main([*to_store, "save_failures_allowed=1"]) == 1
    error = capsys.readouterr().err
    assert "2 saves in a row have failed (save_failures_allowed=1)" in error and "step-4" in error
    assert read(url).step == 2 and [path.parent.name for path in (machine / "runs").rglob("MANIFEST.json")] == [
        "step-4"
    ]
    assert train_main(to_store) == 0
    assert steps(url) == {"step-1", "step-2", "step-4", "step-5", "step-6"}
    assert not list((machine / "runs").rglob("*.safetensors"))
    assert same_end(copied(url, tmp_path / "copy"), undisturbed)


def test_a_last_checkpoint_that_could_not_be_uploaded_is_uploaded_by_the_next_start(
    recipe: Path, tmp_path: Path, undisturbed: Path, url: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    to_store = [str(recipe), *SHORT, f"save_folder={url}", "autoresume=true"]
    with monkeypatch.context() as patched:
        Failing(patched, lambda there: "step-6" in there)
        assert train_main(to_store) == 1
    assert read(url).step == 4
    assert train_main(to_store) == 0
    assert read(url).step == 6 and same_end(copied(url, tmp_path / "copy"), undisturbed)


def test_a_store_that_cannot_be_used_is_said_before_the_first_step(
    recipe: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    Failing(monkeypatch, lambda there: True)
    assert train_main([str(recipe), *SHORT, f"save_folder={url}"]) == 1
    error = capsys.readouterr().err
    assert "owner.json: cannot be written after 5 attempts" in error and "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "drop", "truncate"])
def test_faults_of_an_s3_server_are_outlived(
    recipe: Path, tmp_path: Path, undisturbed: Path, door: Door, fault: Fault  # noqa: F811
) -> None:  # fmt: skip
    count = 0

    def fails(method: str, path: str) -> Fault | None:
        """Every fourth request."""
        nonlocal count
        count += 1
        return fault if count % 4 == 0 else None

    url = "s3://bucket/runs/run"
    door.fault = fails
    to_store = [str(recipe), *SHORT, f"save_folder={url}"]
    assert train_main([*to_store, "max_duration=4ba"]) == 0
    assert train_main([*to_store, "autoresume=true"]) == 0
    door.fault = lambda method, path: None
    assert door.faults > 10 and steps(url) == {"step-2", "step-4", "step-6"}
    assert same_end(copied(url, tmp_path / "copy"), undisturbed)


KILLED = """
import os, signal
import s3fs

real, count = s3fs.S3FileSystem.put_file, 0

def put_file(*args, **keys):
    global count
    count += "step-" in args[2]
    if count == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **keys)

s3fs.S3FileSystem.put_file = put_file
"""


@pytest.mark.slow
def test_a_kill_in_an_upload_loses_no_checkpoint_and_leaves_nothing(
    recipe: Path, tmp_path: Path, undisturbed: Path, machine: Path, door: Door, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "kills.py").write_text(KILLED)
    url = "s3://bucket/runs/run"
    to_store = [str(recipe), *SHORT, f"save_folder={url}", "autoresume=true"]
    script = "import sys; from llmfoundry.cli.train import train_main; sys.exit(train_main())"
    command = ["-c", script, *to_store, f"code_paths=[{tmp_path / 'kills.py'}]"]
    for kill_at in (12, 3):  # in the second checkpoint; in what a start uploads of it
        killed = forks.run(*command, env=os.environ | {"KILL_AT": str(kill_at)})
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert read(url).step == 2
    shutil.rmtree(machine)  # another machine goes on, when it has seen that the killed run does not
    monkeypatch.setattr(owner, "LEASE", 1.0)
    assert train_main(to_store) == 0
    assert steps(url) == {"step-2", "step-4", "step-6"} and not list(machine.rglob("*.tmp-*"))
    manifest = json.loads(fsspec.filesystem("s3").cat_file("bucket/runs/run/checkpoints/step-4/MANIFEST.json"))
    listed = {f"checkpoints/step-4/{name}" for name in (*manifest["files"], "MANIFEST.json")}
    assert {name for name in tree(url) if "step-4" in name} == listed
    assert same_end(copied(url, tmp_path / "copy"), undisturbed)
