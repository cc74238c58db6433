"""`run_timeout`: a run that takes too long saves and stops; a process that does not end is ended."""

from __future__ import annotations

import time
from pathlib import Path

from llmfoundry.cli.train import train_main
from tests import forks
from tests.callbacks.conftest import lines

HANGS = """
import time
from llmfoundry.train.callback import Callback, LoggerConfig

class Hangs(Callback):
    def close(self):
        time.sleep(300)

class HangsConfig(LoggerConfig, names=("hangs",)):
    def build(self):
        return Hangs()
"""


def test_a_run_stops_at_its_limit_and_the_same_command_continues(tiny: Path, tmp_path: Path) -> None:
    command = [str(tiny), "autoresume=true", "callbacks.run_timeout={max_seconds: 1.0e-6}"]
    assert train_main(command) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1]
    assert train_main(command) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert train_main([*command[:-1], "callbacks.run_timeout={timeout: 1800}"]) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_process_that_hangs_after_its_run_leaves_with_exit_code_0(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    script = "import sys; from llmfoundry.cli.train import train_main; sys.exit(train_main())"
    more = [f"code_paths=[{tmp_path / 'hangs.py'}]", "loggers.hangs={}", "callbacks.run_timeout={timeout: 0.5}"]
    begun = time.monotonic()
    done = forks.run("-c", script, str(tiny), *more)
    assert done.returncode == 0 and "run_timeout: the run ended 0.5 seconds ago" in done.stderr
    assert time.monotonic() - begun < 100
    assert len(lines(tmp_path / "run")) == 4
