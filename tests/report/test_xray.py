"""`llmfoundry xray`: which expert takes which token, from every kind of checkpoint, as text, JSON and a page."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from llmfoundry.cli.convert import convert_main
from llmfoundry.cli.main import main
from llmfoundry.cli.opening import open_checkpoint
from llmfoundry.cli.train import train_main
from llmfoundry.cli.xray import xray_main
from llmfoundry.report.experts import pieces
from llmfoundry.report.xray import Xray, colour, show
from tests.callbacks.conftest import tiny_run
from tests.report.test_report import CHROMIUM, draw

ROOT = Path(__file__).resolve().parents[2]
TEXT = "naïve 日 text\n</script> 12"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mixture of which the first layer is dense, its Hugging Face folder, and a dense model."""
    folder = tmp_path_factory.mktemp("xray")
    config = tiny_run(folder) | {"max_duration": "1ba"}
    config["model"]["n_layers"] = 3  # type: ignore[index]
    config["model"]["ffn_config"] |= {"moe_top_k": 2, "first_k_dense": 1}  # type: ignore[index]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert train_main([str(folder / "run.yaml")]) == 0
    dense = ["model.ffn_config:={ffn_type: mptglu}", f"save_folder={folder / 'dense'}"]
    assert train_main([str(folder / "run.yaml"), *dense]) == 0
    assert convert_main(["to-hf", str(folder / "run"), str(folder / "hf")]) == 0
    return {"run": folder / "run", "hf": folder / "hf", "dense": folder / "dense"}


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    assert xray_main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_says_what_the_model_does(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = found(capsys, str(runs["run"]), TEXT)
    assert "".join(token["text"] for token in data["tokens"]) == TEXT
    assert [layer["layer"] for layer in data["layers"]] == [1, 2] and data["n_experts"] == 4
    model = open_checkpoint(str(runs["run"]), [], []).ready.model
    with torch.no_grad():
        load = model(torch.tensor([[token["id"] for token in data["tokens"]]])).router.load  # (L, E)
    for layer, expected in zip(data["layers"], load.tolist(), strict=True):
        counts = Counter(expert for experts in layer["experts"] for expert in experts)
        assert [counts[expert] for expert in range(4)] == expected
        assert all(first >= second > 0 for first, second in layer["weights"])


def test_run_checkpoint_and_hugging_face_folder_agree(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    of_run = found(capsys, str(runs["run"]), TEXT)
    assert found(capsys, str(runs["run"] / "checkpoints" / "step-1"), TEXT) == of_run
    of_folder = found(capsys, str(runs["hf"]), TEXT)
    assert [layer["experts"] for layer in of_folder["layers"]] == [layer["experts"] for layer in of_run["layers"]]


def test_text_comes_from_a_file_or_stdin(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abc", encoding="utf-8")
    expected = found(capsys, str(runs["run"]), "abc")
    assert found(capsys, str(runs["run"]), "--file", str(file), "precision=fp32") == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert found(capsys, str(runs["run"]), "-") == expected


def test_a_long_text_is_read_whole(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = found(capsys, str(runs["run"]), "xyz " * 40)  # max_seq_len is 32
    assert "".join(token["text"] for token in data["tokens"]) == "xyz " * 40
    assert len(data["tokens"]) > 64 and all(len(x["experts"]) == len(data["tokens"]) for x in data["layers"])


def test_without_colours_tokens_carry_numbers(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert xray_main([str(runs["run"]), "ab", "--layer", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layer 2" and re.fullmatch(r"a\[\d \d\]b\[\d \d\]", lines[1])
    assert sum(map(int, re.findall(r"expert \d: (\d)", lines[2]))) == 4


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_on_a_terminal_tokens_have_the_colour_of_their_first_expert(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    experts = torch.tensor([[[3, 1], [0, 3]]], dtype=torch.int16)
    x = Xray([1, 2], ["one", " two"], [0], 4, experts, torch.full((1, 2, 2), 0.5))
    out = io.StringIO()
    show(x, [0], Console(file=out, force_terminal=True, color_system="truecolor", width=40, _environ=environment))
    red, green, blue = (int(colour(3)[i : i + 2], 16) for i in (1, 3, 5))
    assert (f"48;2;{red};{green};{blue}mone" in out.getvalue()) == (not environment)
    assert ("one[3 1] two[0 3]" in out.getvalue()) == bool(environment)
    assert len({colour(expert) for expert in range(256)}) == 256


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_is_drawn_by_a_browser(runs: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "xray.html"
    assert xray_main([str(runs["run"]), TEXT, "--html", str(page)]) == 0
    written = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|url\(|https?:", written), "the page must not need a network"
    document = draw(page, tmp_path / "profile")
    assert document.count('title="layer 1: expert ') == len(re.findall(r'"id":', written))
    assert "</option>" in document and re.search(r"<button[^>]*>expert \d: \d+</button>", document)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{dense}", "abc"], "the model is dense: it has no experts to show"),
        (["{run}", ""], "TEXT is missing; write it after the checkpoint, or - for stdin, or --file FILE"),
        (["{run}"], "TEXT is missing"),
        (["{run}", "abc", "--layer", "0"], "--layer 0: this layer has no experts; choose among 1, 2"),
        (["{run}", "--file", "{run}/none.txt"], "none.txt cannot be read: No such file or directory"),
        (["{run}", "abc", "--json", "--html", "a.html"], "--json and --html FILE are both given; choose one"),
        (["{run}", "abc", "optimizer.lr=1"], "optimizer.lr=1: cannot be changed here"),
        (["{run}/none", "abc"], "none"),
    ],
)
def test_mistakes_are_one_line(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    capsys.readouterr()
    assert xray_main([each.format(**runs) for each in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line


def test_pieces_keep_spaces_that_a_tokenizer_drops_at_the_start() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"\u2581the": 0, "\u2581cat": 1, "s": 2}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="s"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert pieces([0, 1, 2, 1], tokenizer) == ["the", " cat", "s", " cat"]


COMMANDS = [line for line in (ROOT / "docs" / "xray.md").read_text().splitlines()
            if re.match("llmfoundry (xray|report) ", line)]  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_documentation_run(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    (tmp_path / "runs").mkdir()
    for name, run in (("moe", runs["run"]), ("dense", runs["dense"])):
        (tmp_path / "runs" / name).symlink_to(run)
    (tmp_path / "README.md").write_text("A text.\n")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0
    made = {path.name for path in tmp_path.glob("*.html")}
    assert made == {word for word in line.split() if word.endswith(".html")}


def test_the_documentation_has_commands() -> None:
    assert len(COMMANDS) == 5
