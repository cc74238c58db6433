"""The commands of docs/data.md run, in their order, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from llmfoundry.cli.main import main
from tests.data.chat_tokenizer import tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    for line in block.splitlines()
    if line.startswith("llmfoundry ")
]


def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data" / "web").mkdir(parents=True)
    for name in "ab":
        rows = [json.dumps({"text": f"the text {i % 7} of {name}"}) for i in range(40)]
        (tmp_path / "data" / "web" / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "keep.py").write_text("def keep(text: str) -> bool:\n    return '3' not in text\n")
    tokenizer().save_pretrained(tmp_path / "tok")
    config = {
        "max_seq_len": 16,
        "model": {"name": "causal_lm", "d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 448},
        "tokenizer": {"name": "tok"},
        "train_loader": {"dataset": {"name": "text_files", "path": "data/web"}},
        "optimizer": {"name": "adamw", "lr": 0.1},
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
        "max_duration": "2ba", "global_train_batch_size": 4, "save_folder": "runs/moe",
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "run.yaml"]) == 0
    capfd.readouterr()
    said: dict[str, str] = {}
    assert len(COMMANDS) == 11
    for command in COMMANDS:
        if "--part 1/2" in command:  # as on machines that begin with nothing
            Path("cache").rename("cache-before")
        assert main(shlex.split(command)[1:]) == 0, capfd.readouterr().err
        said[command.partition(" ")[2]] = capfd.readouterr().out
    assert said["data show data/web"].startswith("--- data/web: document 0, 15 bytes ---\nthe text 0 of a\n")
    assert "80 documents; 0 empty, 66 equal to an earlier one" in said["data stats data/web"]
    assert "tokens; per document" in said["data stats data/web --tokenizer tok"]
    assert "«" in said["data show run.yaml --rows 2"]
    assert "row 7" in said["data show runs/moe --row 3 7"]
    assert json.loads(said["data stats run.yaml --json"])["number"] == 80
    assert "kept 80 (1,200 bytes)" in said["prepare run.yaml"] and "tokens/s" in said["prepare run.yaml"]
    assert "part 1 of 2 is done" in said["prepare run.yaml --part 1/2"]
    assert "kept 80 (1,200 bytes)" in said["prepare run.yaml --part 2/2"]
    sieved = said["prepare run.yaml --dedup --filter keep.py:keep"]
    assert "read 80 documents; left out 66 duplicates, 2 by the filter; kept 12 (180 bytes)" in sieved
    assert "a run reads this with `dedup: true, filter: keep.py:keep` in its dataset" in sieved
