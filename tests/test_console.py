"""The console script `llmfoundry`: every command by one name."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmfoundry.cli.main import _ENTRIES, main
from tests import forks
from tests.faults.runs import is_saved, metrics, recipe

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(sys.executable).with_name("llmfoundry")


def run(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *words], cwd=cwd, capture_output=True, text=True, env=os.environ | environment)


def test_help_lists_every_command_at_once() -> None:
    found = run("--help", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert found.returncode == 0 and "llmfoundry.cli.main" in imported
    assert not imported & {"torch", "transformers", "numpy"}, "0.15 seconds"
    assert all(f"\n  {name} " in found.stdout for name in _ENTRIES)


@pytest.mark.parametrize("name", _ENTRIES)
def test_every_command_is_there_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    entry = _ENTRIES[name]
    function = getattr(importlib.import_module(entry.module), entry.function)
    with pytest.raises(SystemExit) as ended:
        function(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: " in shown
    lines = [line.strip() for line in shown.partition("examples:\n")[2].splitlines()]
    assert lines and any(f"llmfoundry {name} " in f"{line} " for line in lines)
    options = {word for line in lines if f"llmfoundry {name}" in line for word in re.findall(r"(?<= )--[\w-]+", line)}
    assert all(option in shown.partition("examples:\n")[0] or name == "data_prep" for option in options), options


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "yamls/moe.yaml", "--max-duration=9ba"], "(a setting has no dashes: max_duration=9ba)"),
        (["train", "yamls/moe.yaml", "--dryrun"], "unrecognized arguments: --dryrun (did you mean --dry-run?)"),
        (["convert", "to_hf", "a", "b"], "(did you mean to-hf?)"),
        (["train", "yamls/mo.yaml"], "yamls/mo.yaml: no such file (did you mean yamls/moe.yaml?)"),
        (["train", "yamls/dbrx-132b.yaml", "parallel.expert=1"], "to train without a GPU, and this machine has"),
        (["generate", "--checkpoint", "test"], "test: no such folder (did you mean tests?)"),
        (["generate", "--checkpoint", "tests/step-9"], "tests/step-9: no such folder"),
        (["convert", "from-composer", "nowhere.pt", "out"], "error: nowhere.pt: no such file or folder"),
        (["convert", "from-hf", "yamls", "out"], "yamls/config.json: no such file; name a Hugging Face model's folder"),
    ],
)
def test_a_slip_is_one_line_with_what_was_meant(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    try:
        assert main(words) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("train x.yaml --dry-run --gpus 0", "--gpus: must be an integer from 1 to 16,384, found '0'"),
        ("train x.yaml --dry-run --gpu-memory nan", "--gpu-memory: must be a number above 0, found 'nan'"),
        ("data show x --rows -1", "--rows: must be an integer of at least 1, found '-1'"),
        ("data show x --row -1", "--row: must be an integer of at least 0, found '-1'"),
        ("data stats x --limit many", "--limit: must be an integer of at least 1, found 'many'"),
        ("generate --checkpoint x --max-new-tokens 0", "--max-new-tokens: must be an integer of at least 1, found '0'"),
        ("generate --checkpoint x --temperature -1", "--temperature: must be a number of at least 0, found '-1'"),
        ("generate --checkpoint x --top-p 0", "--top-p: must be a number above 0 and at most 1, found '0'"),
        ("chat --checkpoint x --port 70000", "--port: must be an integer from 0 to 65,535, found '70000'"),
        ("eval --checkpoint x --tasks piqa --limit 0", "--limit: must be an integer of at least 1, found '0'"),
        ("prepare x.yaml --workers 0", "--workers: must be an integer of at least 1, found '0'"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_option(
    words: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: argument {wanted}; see ")


@pytest.mark.parametrize("words", [["nope"], ["--nope"]])
def test_a_wrong_command_is_the_users_mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "nope" in capsys.readouterr().err


def test_a_warning_of_the_hub_is_printed_once() -> None:
    code = """if True:
        import logging, huggingface_hub.utils
        from llmfoundry.cli.command import command
        command(lambda argv: logging.getLogger("huggingface_hub.utils").warning("trying again"))([])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("trying again") == 1


def test_a_command_keeps_its_exit_code() -> None:
    found = run("train", "no-such.yaml")
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith("error: no-such.yaml")


def test_a_shell_completes_commands() -> None:
    found = run(COMP_WORDS="llmfoundry tr", COMP_CWORD="1", _LLMFOUNDRY_COMPLETE="bash_complete")
    assert "plain,train" in found.stdout


def test_doctor_reads_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", str(tmp_path)]) == 0
    found = capsys.readouterr().out
    for name in ("system", "torch", "GPU", "memory", "disk", "file locks", "open files", "Hugging Face hub"):
        assert f" {name}" in found, name
    assert "MiB/s" in found and list(tmp_path.iterdir()) == []


def test_doctor_says_what_a_run_will_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", str(tmp_path), "yamls/dense.yaml"]) == 0
    found = capsys.readouterr().out
    assert "yamls/dense.yaml on this machine" in found and "without a GPU: weights and gradients take" in found
    assert main(["doctor", "--folder", str(tmp_path), "yamls/dense.yaml", "model.d_model=-1"]) == 2
    assert "error: model.d_model" in capsys.readouterr().err


def test_doctor_prints_no_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor", "--folder", str(tmp_path)]) == 0
    found = capsys.readouterr().out
    assert "a token is set" in found and "hf_secret" not in found


def test_explain_says_what_each_key_became(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tests/integrations/foundry/pretrain_moe.yaml"]) == 0
    lines = {re.split("[: ]", line)[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["model.d_model"].endswith("unchanged")
    assert "ignored: it does not change results" in lines["model.init_device"]
    assert "left out: 0 is off" in lines["model.ffn_config.moe_jitter_eps"]
    assert "left out" in lines["train_loader.dataset.predownload"]
    assert "is missing" in lines["save_folder"]


# What stdout may become while a command runs.
STDOUT = {
    "a pipe without a reader": "r, w = os.pipe(); os.close(r); os.dup2(w, 1)",
    "a full disk": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
    "closed by the shell": "os.close(1)",
}
COMMAND = """
import os, sys
{stdout}
try:
    sys.stdout = open(1, "w", closefd=False)
except OSError:  # as when Python starts
    sys.stdout = None
from llmfoundry import launch
from llmfoundry.cli.main import main
launch.leave(main({words!r}))
"""


@pytest.mark.parametrize("stdout", STDOUT)
def test_a_console_that_is_lost_ends_no_run(stdout: str, tmp_path: Path) -> None:
    """`train.py ... | tee log`, of which tee is killed, or `> log` on a disk that is full."""
    file = recipe(tmp_path, max_duration="3ba", save_interval="1ba", log_to_console=True)
    found = forks.run("-c", COMMAND.format(stdout=STDOUT[stdout], words=["train", str(file)]))
    assert found.returncode == 0, found.stderr
    assert is_saved(tmp_path / "run", 3) and len(metrics(tmp_path / "run")) == 3
    said = [line for line in found.stderr.splitlines() if "stdout" in line]
    assert len(said) == ("closed" not in stdout), found.stderr
    assert all(line.endswith("training continues without it") for line in said), found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(("stdout", "code"), [*zip(STDOUT, (141, 1, 0), strict=True)])
def test_a_command_whose_output_is_lost_says_so_unless_its_reader_has_seen_enough(
    stdout: str, code: int, tmp_path: Path
) -> None:
    words = ["explain", str(recipe(tmp_path))]
    found = forks.run("-c", COMMAND.format(stdout=STDOUT[stdout], words=words))
    assert found.returncode == code, found.stderr
    assert found.stderr == ("error: stdout cannot be written: No space left on device\n" if code == 1 else "")
