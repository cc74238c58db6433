"""A cached folder is whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from llmfoundry.data.cache import made_once
from llmfoundry.data.watch import Damaged, moved_aside

fork = multiprocessing.get_context("fork")


def _slowly(folder: Path) -> None:
    with (folder / "made").open("a") as file:
        file.write("first half, ")
        time.sleep(0.2)
        file.write("second half")


def _make_slowly(folder: Path) -> None:
    made_once(folder, _slowly)


def _die_halfway(folder: Path) -> None:
    def make(temporary: Path) -> None:
        (temporary / "made").write_text("first half, ")
        os._exit(9)

    made_once(folder, make)


def test_processes_at_once_share_one_result(tmp_path: Path) -> None:
    processes = [fork.Process(target=_make_slowly, args=(tmp_path / "x",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "x" / "made").read_text() == "first half, second half"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.lock"]


def test_killed_maker_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    process = fork.Process(target=_die_halfway, args=(tmp_path / "x",))
    process.start()
    process.join()
    assert process.exitcode == 9 and not (tmp_path / "x").exists()
    made_once(tmp_path / "x", _slowly)
    assert (tmp_path / "x" / "made").read_text() == "first half, second half"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.lock"]


def test_first_rename_wins_where_locks_do_not_work(tmp_path: Path) -> None:
    def make(temporary: Path) -> None:
        (temporary / "made").write_text("mine")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "made").write_text("theirs")

    made_once(tmp_path / "x", make)
    assert (tmp_path / "x" / "made").read_text() == "theirs"


def test_failed_maker_leaves_no_folder(tmp_path: Path) -> None:
    def make(temporary: Path) -> None:
        (temporary / "made").write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        made_once(tmp_path / "x", make)
    assert not list(tmp_path.iterdir())


def test_of_several_that_find_a_folder_damaged_the_first_moves_it(tmp_path: Path) -> None:
    folder, damaged = tmp_path / "made", True
    folder.mkdir()

    def opened() -> None:
        if damaged:
            raise Damaged("as it was")

    away = moved_aside(folder, opened)
    assert away is not None and away.is_dir() and not folder.exists()
    assert moved_aside(folder, opened) is None, "the first has moved it"
    folder.mkdir()
    damaged = False
    assert moved_aside(folder, opened) is None and folder.is_dir(), "the first has made it again"
