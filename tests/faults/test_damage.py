"""A damaged checkpoint is named, and the one before it is used, by whoever opens a run."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from boxed import Box
from safetensors.torch import load_file, save_file
from small_run import copied, sign

from llmfoundry.checkpoint import reading
from llmfoundry.checkpoint.manifest import MANIFEST, DamagedError
from llmfoundry.checkpoint.reading import read
from llmfoundry.config import ConfigError, RunError
from llmfoundry.train.outputs import RunFolder
from llmfoundry.train.owner import OWNER


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _link(file: Path) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2), "flipped": _flip, "missing": Path.unlink,
    "link": _link, "pipe": _pipe, "folder": _folder,
}  # fmt: skip
FILES = [
    MANIFEST, "tensors.json", "trainer.json", "config.yaml", "model-00000.safetensors", "optimizer-00000.safetensors",
    "rng-00000.safetensors", "tokenizer/tokenizer.json",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_every_file_damaged_in_every_way(run: Path, name: str, damage: Callable[[Path], None]) -> None:
    newest = copied(run, "damaged") / "checkpoints" / "step-6"
    damage(newest / name)
    assert read(newest.parents[1], "everything").step == 4
    # A manifest in which one bit is another may give the wrong sum of a file.
    with pytest.raises(DamagedError, match=f"{newest}/{'' if name == MANIFEST else name}"):
        read(newest, "everything")


def _socket(file: Path) -> None:
    file.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as here, contextlib.chdir(file.parent):
        here.bind(file.name)


def _sparse(file: Path) -> None:
    """Two gigabytes of NUL, which take no space."""
    with file.open("wb") as opened:
        opened.truncate(2**31)


OUTPUTS = ["metrics.jsonl", "skipped.jsonl", "config.yaml", "summary.json", OWNER, ".lock"]


@pytest.mark.parametrize("name", [*OUTPUTS, *(f"{name}.tmp" for name in OUTPUTS)])
@pytest.mark.parametrize("put", [_pipe, _folder, _socket, _sparse])
def test_what_is_put_in_the_place_of_a_runs_files_is_one_line_at_most(
    tmp_path: Path, name: str, put: Callable[[Path], None]
) -> None:
    """Pipes were waited for without end, folders were a traceback, and two gigabytes were read at once."""
    (tmp_path / name).touch()
    put(tmp_path / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(10)
    folder = None
    try:
        folder = RunFolder.claim(tmp_path)
        folder.take(str(tmp_path))
        folder.begin({"seed": 1}, None, 0)
        folder.open_metrics(0)
        folder.write_metrics({"step": 1})
        folder.write_summary({"step": 1})
    except (ConfigError, RunError) as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
    else:
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    finally:
        signal.alarm(0)
        if folder is not None:
            folder.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise AssertionError("it waits")


def _edited(name: str, edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        said = json.loads((checkpoint / name).read_text())
        edit(said)
        (checkpoint / name).write_text(json.dumps(said))
        if name != MANIFEST:
            sign(checkpoint)

    return damage


def _text(name: str, text: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / name).write_text(text)
        if name != MANIFEST:
            sign(checkpoint)

    return damage


def _box(said: dict) -> dict:
    """The first entry of the layout of a tensor."""
    return said["layouts"][said["tensors"]["model/wte.weight"]["layout"]][0]


def _weight(said: dict) -> dict:
    return said["tensors"]["model/wte.weight"]


def _doubled(said: dict) -> None:
    """Two boxes that add up to the tensor and are the same half of it."""
    box = _box(said)
    box["shape"][0] //= 2
    box.update(count=2, rank_step=0, steps=[0, 0])


def _earlier(said: dict) -> None:
    """A tensor as earlier versions wrote it, in a file outside of the folder."""
    shape = said["tensors"]["model/wte.weight"]["shape"]
    chunk = {"file": "../model-00000.safetensors", "start": 8, "offsets": [0, 0], "shape": shape}
    said["tensors"]["model/wte.weight"] = {"dtype": "F32", "shape": shape, "chunks": [chunk]}


def _turned(checkpoint: Path) -> None:
    """A file of weights whose header gives a tensor another shape of the same size."""
    file = checkpoint / "model-00000.safetensors"
    content = file.read_bytes()
    assert b"[300, 32]" in content
    file.write_bytes(content.replace(b"[300, 32]", b"[32, 300]", 1))
    sign(checkpoint)


def _with_nan(checkpoint: Path) -> None:
    """A weight that is NaN, in a checkpoint of an earlier version: its manifest does not say that anyone has looked."""
    file = checkpoint / "model-00000.safetensors"
    tensors = load_file(file)
    tensors["wte.weight"][5, 7] = float("nan")
    save_file(tensors, file)
    sign(checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert manifest.pop("finite") is True
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


UNTRUE = {
    "manifest 1e400": _text(MANIFEST, '{"format":1,"step":6,"files":{"config.yaml":{"bytes":1e400,"sha256":""}}}'),
    "manifest NaN": _text(MANIFEST, '{"format":1,"step":NaN,"files":{}}'),
    "manifest deep": _text(MANIFEST, "[" * 100_000),
    "manifest outside": _edited(MANIFEST, lambda said: said["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
    "manifest list": _text(MANIFEST, "[]"),
    "manifest step": _edited(MANIFEST, lambda said: said.update(step=999)),
    "trainer step": _edited("trainer.json", lambda said: said.update(step=-3)),
    "trainer other step": _edited("trainer.json", lambda said: said.update(step=5)),
    "trainer rows": _edited("trainer.json", lambda said: said["state"].update(rows=-8)),
    "trainer skipped": _edited("trainer.json", lambda said: said["state"].update(skipped_steps=7)),
    "trainer 1e400": _text("trainer.json", '{"step": 1e400}'),
    "trainer deep": _text("trainer.json", '{"step":' * 100_000),
    "tensors 1e400": _text("tensors.json", '{"tensors":{"model/x":{"dtype":"F32","shape":[1e400],"chunks":[]}}}'),
    "tensors fraction": _edited("tensors.json", lambda said: _box(said).update(rank=1.5)),
    "tensors beyond": _edited("tensors.json", lambda said: _box(said).update(offsets=[10**9, 0])),
    "tensors many": _edited("tensors.json", lambda said: _box(said).update(count=10**12, rank_step=1, steps=[1, 0])),
    "tensors no layout": _edited("tensors.json", lambda said: said["tensors"]["model/wte.weight"].update(layout=99)),
    "tensors outside": _edited(
        "tensors.json", lambda said: said["tensors"].update({"..": said["tensors"].popitem()[1]})
    ),
    "tensors unlisted": _edited("tensors.json", lambda said: _box(said).update(rank=1)),
    "tensors overlap": _edited("tensors.json", _doubled),
    "tensors of an earlier version": _edited("tensors.json", _earlier),
    "header": _turned,
    "not finite": _with_nan,
    "config bomb": _text("config.yaml", "a: &a [x,x]\nb: *a\nc: [*a, *a\n"),
}


@pytest.mark.parametrize("damage", UNTRUE.values(), ids=UNTRUE)
def test_what_cannot_be_true_is_damage(run: Path, damage: Callable[[Path], None]) -> None:
    newest = copied(run, "untrue") / "checkpoints" / "step-6"
    damage(newest)
    assert read(newest.parents[1], "everything").step == 4
    with pytest.raises(DamagedError, match=str(newest)):
        read(newest, "everything")


def test_weights_that_are_not_finite_are_passed_over_by_every_command(box: Box, place: Path, run: Path) -> None:
    nan = copied(run, "nan")
    _with_nan(nan / "checkpoints" / "step-6")
    for words in (
        ("generate", "--checkpoint", nan, "--prompt", "a", "--max-new-tokens", "1"),
        ("convert", "to-hf", nan, place / "nan-hf"),
        ("train", place / "small.yaml", f"save_folder={nan}", "max_duration=7ba"),
    ):
        ended = box.run(*words)
        assert ended.code == 0 and "SKIPPING A DAMAGED CHECKPOINT" in ended.err, ended.err
        assert "step-6/model-00000.safetensors: wte.weight has values that are not finite" in ended.err
    one = box.run("generate", "--checkpoint", nan / "checkpoints" / "step-6", "--prompt", "a")
    assert one.code == 2 and len(one.lines) == 1 and "has values that are not finite" in one.err, one.err


def test_who_was_looked_at_when_it_was_saved_is_not_read_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unused(file: Path) -> None:
        raise AssertionError(f"{file} was read for it")

    monkeypatch.setattr(reading, "check_finite", unused)
    assert read(run, "everything").step == 6


def test_a_renamed_checkpoint_is_not_believed(run: Path) -> None:
    folder = copied(run, "renamed") / "checkpoints"
    (folder / "step-2").rename(folder / "step-999")
    assert read(folder, "everything").step == 6
    shutil.copytree(folder / "step-6", folder.parent / "best")  # any other name may be given
    assert read(folder.parent / "best").step == 6


def test_every_command_takes_the_newest_whole_one(box: Box, place: Path, run: Path) -> None:
    damaged = copied(run, "fallback")
    _edited("tensors.json", lambda said: _box(said).update(rank=1e300))(damaged / "checkpoints" / "step-6")
    for words in (
        ("generate", "--checkpoint", damaged, "--prompt", "a", "--max-new-tokens", "1"),
        ("eval", "--checkpoint", damaged),
        ("convert", "to-hf", damaged, place / "fallback-hf"),
        ("train", place / "small.yaml", f"load_path={damaged}", "load_weights_only=true", "save_folder=fallback-new"),
        ("train", place / "small.yaml", f"save_folder={damaged}", "max_duration=7ba"),
    ):
        ended = box.run(*words)
        assert ended.code == 0, ended.err
        assert "SKIPPING A DAMAGED CHECKPOINT" in ended.err and "step-6/tensors.json" in ended.err, ended.err
    named = box.run("generate", "--checkpoint", run.with_name("fallback") / "checkpoints" / "step-6", "--prompt", "a")
    assert named.code == 2 and len(named.lines) == 1 and "step-6/tensors.json" in named.err


KILL = """
import os, signal
from llmfoundry.checkpoint.checkpointer import Checkpointer
left = int(os.environ["KILL_AFTER"])
def counted(do):
    def done(*words, **more):
        global left
        found = do(*words, **more)
        if saving:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return found
    return done
saving, save = False, Checkpointer.save
def watched(self, state):
    global saving
    saving = state.step == 8
    return save(self, state)
Checkpointer.save = watched
for name in ("mkdir", "rename", "replace", "symlink", "fsync", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
"""


@pytest.mark.parametrize("after", [1, 3, 9, 14, 16, 20, 24])
def test_a_kill_in_the_last_save_leaves_no_orphans(box: Box, place: Path, run: Path, after: int) -> None:
    (place / "kill.py").write_text(KILL)
    killed = copied(run, "killed")
    words = (place / "small.yaml", f"save_folder={killed}", "max_duration=8ba", "save_num_checkpoints_to_keep=2")
    ended = box.run("train", *words, "code_paths=[kill.py]", env={"KILL_AFTER": str(after)})
    assert ended.code == -signal.SIGKILL, ended.err
    again = box.run("train", *words)
    assert again.code == 0, again.err
    names = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert names == ["latest", "step-6", "step-8"]
    assert not [path for path in killed.rglob("*") if ".tmp" in path.name]
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 9)]


def test_missing_lines_of_metrics_are_said(box: Box, place: Path, run: Path) -> None:
    gap = copied(run, "gap")
    lines = (gap / "metrics.jsonl").read_text().splitlines(keepends=True)
    (gap / "metrics.jsonl").write_text("".join([*lines[:2], *lines[4:]]))
    ended = box.run("train", place / "small.yaml", f"save_folder={gap}", "max_duration=7ba")
    assert ended.code == 0 and "has no line of steps 3 to 4" in ended.err, ended.err
    (gap / "metrics.jsonl").write_text("".join([*lines[:2], '{"step": 1e400}\n', *lines[2:]]))
    ended = box.run("train", place / "small.yaml", f"save_folder={gap}", "max_duration=8ba")
    assert ended.code == 2 and "metrics.jsonl: line 3 is damaged" in ended.err, ended.err


@pytest.mark.parametrize("key", ["unevaluated", "callbacks"])
def test_what_no_trainer_keeps_beside_its_state_is_one_line(box: Box, place: Path, run: Path, key: str) -> None:
    """It was a traceback; the weights can still be had with load_weights_only."""
    strange = copied(run, "strange")
    said = {"unevaluated": [1], "callbacks": {"callbacks.report": {"fingerprints": 1}}}[key]
    for step in (2, 4, 6):
        _edited("trainer.json", lambda trainer: trainer.update({key: said}))(strange / "checkpoints" / f"step-{step}")
    ended = box.run("train", place / "small.yaml", f"save_folder={strange}", "max_duration=7ba")
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert "step-6: trainer.json contains values that no run saves" in ended.err, ended.err
