"""What stands in the documentation is true: its commands run word for word, its examples run, its YAML is valid.

Each page runs in a folder of its own, in the order of the page. A command that cannot run here is in `NOT_HERE`, with
the reason; everything else has to succeed. Three differences from a reader's terminal: YAMLs and models are small
(tests/reader_folder.py), torchrun's script runs in this process alone, and the server has a free port.
"""

from __future__ import annotations

import importlib
import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch.distributed.run
import yaml
from transformers import TrainingArguments

import llmfoundry.callbacks  # noqa: F401  registers those that examples name
from llmfoundry.cli.command import Command
from llmfoundry.cli.main import main
from llmfoundry.config import check
from llmfoundry.integrations.foundry_yaml import translate
from llmfoundry.settings import load_yaml
from llmfoundry.standalone.megablocks import Arguments
from llmfoundry.train.config import RunConfig
from tests import forks
from tests.pages import LANGUAGES, PAGES, ROOT, Block, blocks, commands
from tests.reader_folder import fill

# Commands by their first words, and why they do not run here.
NOT_HERE = {
    "make": "installs from the internet, or is what runs this test",
    "source .venv/bin/activate": "the environment is already there",
    "pip install": "needs the internet",
    "sbatch": "needs Slurm",
    "torchrun --nproc-per-node 8 scripts/train.py yamls/moe.yaml run_name=moe 'save_folder=s3://": "needs a store",
    "python scripts/generate.py --checkpoint s3://": "needs a store; tests/train/test_stores.py uses one",
    "python scripts/convert.py to-hf s3://": "needs a store; tests/train/test_stores.py uses one",
    "torchrun --nnodes": "needs two nodes",
    "vllm serve": "needs vLLM and a GPU",
    "python scripts/eval.py --checkpoint runs/moe --tasks": "needs lm-eval; tests/eval/test_lm_eval.py runs it",
    "python scripts/eval.py --checkpoint hf:out/moe --tasks": "needs lm-eval; tests/eval/test_lm_eval.py runs it",
    "python scripts/bench/": "takes minutes or a GPU",
    "torchrun --nproc-per-node 2 scripts/bench/": "needs two GPUs",
}
# Blocks that other tests run, word for word.
ELSEWHERE = {
    ("chats.md", "bash"): "tests/test_recipe_of_chats.py",
    ("chats.md", "yaml"): "tests/test_recipe_of_chats.py",
    ("recipes.md", "bash"): "tests/test_recipes.py",
    ("recipes.md", "yaml"): "tests/test_recipes.py",
}
EXAMPLES_NOT_HERE = {"composer.md": "tests/integrations/test_composer.py runs it in Composer's environment"}
# What a page takes from those that a reader has read before: the commands that make it.
BEFORE = {
    "runs/moe": "llmfoundry train yamls/moe.yaml",
    "runs/dense": "llmfoundry train yamls/dense.yaml",
    "runs/finetune": "llmfoundry train yamls/finetune.yaml",
    "out/moe": "llmfoundry convert to-hf runs/moe out/moe",
    "ckpt/dense": "llmfoundry convert from-hf HuggingFaceTB/SmolLM2-135M ckpt/dense",
}
# Words of commands that would take minutes, and what stands in their place here.
SMALLER = {
    "--gpus 64": "--gpus 4",
    "--gpus 8": "--gpus 2",
    "max_duration=1200ba": "max_duration=4ba",
    "max_duration=100ba": "max_duration=2ba",
    "/config.yaml": "/config.yaml max_duration=2ba max_seq_len=64 global_train_batch_size=4",
}
FROM_NOTHING = {"quick-start.md"}
CONVERTED = re.compile(r"convert(?:\.py)? \S+ \S+ (\S+)")  # its group is what the command writes
SHELL = {"mkdir", "echo", "curl"}
each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def _runs(block: Block) -> bool:
    if block.language == "python" and block.page.name in EXAMPLES_NOT_HERE:
        return False
    return block.language in ("bash", "python") and (block.page.name, block.language) not in ELSEWHERE


# Those that are run as whole files are left out.
YAML = [
    block
    for page in PAGES
    for block in blocks(page, "yaml")
    if (page.name, "yaml") not in ELSEWHERE
    and "models:\n" not in block.text
    and "plugins:" not in block.text  # axolotl's
]
RUNNING = [page for page in PAGES if any(map(_runs, blocks(page)))]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has run nothing yet."""
    folder = tmp_path_factory.mktemp("reader")
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def begun(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has run the quick start."""
    folder = tmp_path_factory.mktemp("begun") / "folder"
    shutil.copytree(empty, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMFOUNDRY_CACHE", str(empty / "cache"))
        patch.chdir(folder)
        for line in BEFORE.values():
            assert main(shlex.split(line)[1:]) == 0, line
    return folder


@each_page
def test_every_block_names_its_language(page: Path) -> None:
    unknown = [f"{page.name}:{block.line}" for block in blocks(page) if block.language not in LANGUAGES]
    assert not unknown


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=[str(page.relative_to(ROOT)) for page in RUNNING])
def test_commands_and_examples_run(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    here = [block for block in blocks(page) if _runs(block)]
    source: Path = request.getfixturevalue("empty" if page.name in FROM_NOTHING else "begun")
    made = {found[1] for block in here for found in CONVERTED.finditer(block.text)}
    shutil.copytree(
        source, tmp_path / "folder", symlinks=True,
        ignore=lambda folder, names: [name for name in names if str(Path(folder, name).relative_to(source)) in made],
    )  # fmt: skip
    monkeypatch.chdir(tmp_path / "folder")
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(request.getfixturevalue("empty") / "cache"))
    with _server() as servers:
        for block in here:
            if block.language == "python":
                _run_python(block)
                continue
            for line in commands(block):
                if _reason(line) is None:
                    code = _run(line, monkeypatch, servers)
                    said = capfd.readouterr()
                    assert code == 0, f"{page.name}:{block.line}: {line}\n{said.out[-2000:]}\n{said.err[-4000:]}"


def test_every_reason_is_needed() -> None:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in commands(block)]
    assert not [start for start in NOT_HERE if not any(_plain(line).startswith(start) for line in lines)]
    texts = "".join(block.text for page in PAGES for block in blocks(page) if _runs(block))
    assert not [given for given in SMALLER if given not in texts]
    for (name, language), path in ELSEWHERE.items():
        assert blocks(ROOT / "docs" / name, language) and name in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("block", YAML, ids=[f"{block.page.stem}-{block.line}" for block in YAML])
def test_yaml_is_valid_in_a_run(block: Block) -> None:
    """Each example, put over a whole run, passes every check that a run's YAML passes."""
    given = yaml.safe_load(block.text)
    run = load_yaml(ROOT / "yamls" / "moe.yaml") | {"eval_loader": None}
    if "block_overrides" in given:
        given = {"model": run["model"] | {"name": "mpt_causal_lm", "n_layers": 24, "ffn_config": {}} | given}
    if "eval_gauntlet" in given:  # of the tasks on the same page
        run |= yaml.safe_load(next(found.text for found in YAML if "icl_tasks:\n  - " in found.text))
    given = {key: value for key, value in given.items() if not str(value).endswith(".yaml")}  # files of that page
    model = run["model"] | {"max_seq_len": given.get("max_seq_len", 256)} | given.get("model", {})
    check(RunConfig, translate(run | given | {"model": model})[0])


@pytest.mark.parametrize(
    ("name", "part", "theirs"),
    [("from-megablocks", "arguments", Arguments), ("from-torchtitan", "trainer", TrainingArguments)],
)
def test_tables_of_keys_name_what_exists(name: str, part: str, theirs: type) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"<!-- {part} -->\n(.*?)<!-- /{part} -->", page, flags=re.DOTALL)
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    names = {word for row in rows for word in re.findall(r"`(\w+)`", row[0])}
    ours = {word for row in rows for word in re.findall(r"`([\w.]+)(?:: \w+)?`", row[1]) if not word[0].isdigit()}
    known = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "reference.md").read_text(), flags=re.MULTILINE))
    assert len(names) > 15 and names <= {field.name for field in fields(theirs)}
    assert ours <= known, ours - known


def test_every_recorded_figure_is_on_the_page_of_performance() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    lines = "\n".join(line for block in blocks(ROOT / "docs" / "performance.md", "bash") for line in commands(block))
    for result in (ROOT / "scripts" / "bench" / "results").glob("*.json"):
        command = {"prepare_scaling": "prepare.py --scaling"}.get(result.stem, f"{result.stem}.py")
        assert f"scripts/bench/{command}" in lines, f"{result.name}: no command repeats it"
    markers = re.findall(r"^<!-- ([\w-]+) -->\n(<!--|\|)?", page, flags=re.MULTILINE)
    assert len(markers) >= 13 and not [name for name, follows in markers if follows == "<!--"]  # none is empty


def test_words_of_make_exist() -> None:
    words = {
        word
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for block in blocks(page, "bash")
        for line in commands(block)
        if line.startswith("make")
        for word in shlex.split(line, comments=True)[1:]
        if "=" not in word
    }
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert phony is not None and words and words <= set(phony[1].split())


def test_a_first_task_takes_three_commands_at_most() -> None:
    page = ROOT / "docs" / "quick-start.md"
    tasks = page.read_text(encoding="utf-8").split("\n## ")
    assert len([task for task in tasks if re.match(r"\d\. ", task)]) == 9
    lines = {block.line: len(commands(block)) for block in blocks(page, "bash")}
    assert len(lines) >= 8 and max(lines.values()) <= 3


def _plain(line: str) -> str:
    return line.replace(".venv/bin/", "") if not line.startswith("source") else line


def _reason(line: str) -> str | None:
    return next((reason for start, reason in NOT_HERE.items() if _plain(line).startswith(start)), None)


def _run(line: str, monkeypatch: pytest.MonkeyPatch, servers: list[Server]) -> int:
    for given, smaller in SMALLER.items():
        line = line.replace(given, smaller)
    words = shlex.split(_plain(line), comments=True)
    if words[0] in SHELL:
        for server in servers:
            line = line.replace(":8000/", f":{server.port}/")
        ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert words[0] != "curl" or '"choices"' in ran.stdout, ran  # curl calls an answer of any status a success
        return ran.returncode
    monkeypatch.setattr("sys.stdin", io.StringIO("What do you sell?\n"))
    if "--web" in words:
        servers.append(Server(words))
        return 0
    if words[0] == "torchrun":
        given = torch.distributed.run.get_args_parser().parse_args(words[1:])
        words = ["python", given.training_script, *given.training_script_args]
    if words[0] == "python":
        return _main_of(words[1])(words[2:])
    assert words[0] == "llmfoundry", f"{words[0]} is neither run nor in NOT_HERE"
    return main(words[1:])


def _main_of(script: str) -> Command:
    """The function that a file of scripts/ calls."""
    found = re.search(r"^from (llmfoundry\.cli\.\w+) import (\w+_main)$", Path(script).read_text(), flags=re.MULTILINE)
    assert found is not None, script
    main_of: Command = getattr(importlib.import_module(found[1]), found[2])
    return main_of


def _run_python(block: Block) -> None:
    text = "\n" * block.line + block.text
    for given, smaller in SMALLER.items():
        text = text.replace(given, smaller)
    code = compile(text, str(block.page), "exec")
    exec(code, {"__name__": "__main__"})
    for name in [name for name in sys.modules if name.partition(".")[0] == "megablocks"]:
        del sys.modules[name]


class Server:
    """A command that serves until it is stopped, on a free port."""

    def __init__(self, words: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        at = words.index("--port") + 1
        words = [*words[:at], str(self.port), *words[at + 1 :]]
        # A shell's background jobs ignore Ctrl-C, and so would this process if the test is one of them.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += "from llmfoundry.cli.main import run; run()"
        self._process = forks.start("-c", code, *words[1:])
        end = time.monotonic() + 300
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < end, words
            time.sleep(0.1)

    def stop(self) -> int:
        """Stop it as Ctrl-C does; returns its exit code."""
        self._process.send_signal(2)
        return self._process.wait(60)

    def _answers(self) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def _server() -> Iterator[list[Server]]:
    servers: list[Server] = []
    try:
        yield servers
    finally:
        codes = [server.stop() for server in servers]
    assert codes == [0] * len(codes)
