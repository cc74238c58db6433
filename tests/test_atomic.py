"""Files that users name, and lines of files, on a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llmfoundry.atomic import append_line, os_error, write_output
from llmfoundry.cli.prompts import write_completions
from llmfoundry.config import ConfigError
from llmfoundry.eval.generate_many import Completion
from tests.full_disk import full_disk


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    append_line(file, "first")
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        append_line(file, "the second line")
    append_line(file, "third")
    assert file.read_text() == "first\nthird\n"


def test_an_output_is_whole_or_as_it_was_and_devices_and_links_stay(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "out.json", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    write_output(link, "first")
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        write_output(link, "the second text")
    assert link.is_symlink() and file.read_text() == "first"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(pipe, "as it comes")
    assert os.read(reader, 99) == b"as it comes" and pipe.is_fifo()
    os.close(reader)
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "link", "pipe"}


def test_completions_on_a_full_disk_are_whole_lines(tmp_path: Path) -> None:
    rows = [{"prompt": str(number)} for number in range(5)]
    done = (Completion(text="text", finish="stop", tokens=3) for _ in rows)
    with full_disk(180), pytest.raises(ConfigError, match=r"File too large; it has the first 2 of 5 completions"):
        write_completions(tmp_path / "out.jsonl", rows, done)
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 2


def test_errors_of_libraries_in_rust_have_a_number() -> None:
    found = os_error(Exception("No space left on device (os error 28)"))
    assert found is not None and found.errno == errno.ENOSPC and found.strerror == "No space left on device"
    assert os_error(Exception("No space left")) is None
