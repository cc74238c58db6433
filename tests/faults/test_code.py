"""Nothing that a checkpoint names runs when it is opened, unless its user says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from boxed import Box
from small_run import copied, sign

EVIL = "open('PWNED', 'w').write('x')\ndef keep(text): return True\n"
OPENED = [
    ("generate", "--checkpoint", "RUN", "--prompt", "a", "--max-new-tokens", "1"),
    ("eval", "--checkpoint", "RUN"),
    ("chat", "--checkpoint", "RUN"),
    ("xray", "RUN", "a"),
    ("convert", "to-hf", "RUN", "OUT"),
    ("convert", "upcycle", "RUN", "OUT", "moe_num_experts=4", "moe_top_k=2"),
]


def _with_config(run: Path, name: str, before: str, after: str) -> Path:
    checkpoint = copied(run, name) / "checkpoints" / "step-6"
    config = checkpoint / "config.yaml"
    text = config.read_text()
    assert text.count(before) == 1
    config.write_text(text.replace(before, after))
    sign(checkpoint)
    return checkpoint


@pytest.mark.parametrize("words", OPENED, ids=lambda words: " ".join(words[:2]))
def test_plugins_of_a_checkpoint_do_not_run(box: Box, place: Path, run: Path, words: tuple[str, ...]) -> None:
    (place / "evil.py").write_text(EVIL)
    checkpoint = _with_config(run, "plugins", "code_paths: []", "code_paths: [evil.py]")
    ended = box.run(*(str(checkpoint) if word == "RUN" else word for word in words))
    assert not (place / "PWNED").exists() and not (place / "OUT").exists()
    assert ended.code == 2 and len(ended.lines) == 1, ended
    assert "evil.py" in ended.err and str(checkpoint) in ended.err and "--allow-code" in ended.err


def test_its_user_may_let_it_run_or_do_without(box: Box, place: Path, run: Path) -> None:
    (place / "evil.py").write_text(EVIL)
    checkpoint = _with_config(run, "plugins", "code_paths: []", "code_paths: [evil.py]")
    without = box.run(*OPENED[0][:2], checkpoint, *OPENED[0][3:], "code_paths=[]")
    assert without.code == 0 and not (place / "PWNED").exists(), without.err
    allowed = box.run(*OPENED[0][:2], checkpoint, *OPENED[0][3:], "--allow-code")
    assert allowed.code == 0 and (place / "PWNED").exists(), allowed.err
    (place / "PWNED").unlink()


def test_a_function_on_the_data_of_a_checkpoint_does_not_run(box: Box, place: Path, run: Path) -> None:
    (place / "evil.py").write_text(EVIL)
    (place / "texts").mkdir(exist_ok=True)
    (place / "texts" / "a.txt").write_text("some words " * 200)
    before = "eval_loader:\n  name: text\n  dataset:\n    name: synthetic\n    split: validation\n"
    after = f"eval_loader:\n  dataset:\n    name: text_files\n    path: {place / 'texts'}\n    filter: evil.py:keep\n"
    text = (run / "checkpoints" / "step-6" / "config.yaml").read_text()
    block = text[text.index(before) : text.index("optimizer:")]
    checkpoint = _with_config(run, "functions", block, after)
    refused = box.run("eval", "--checkpoint", checkpoint)
    assert refused.code == 2 and "eval_loader.dataset.filter" in refused.err and not (place / "PWNED").exists()
    used = box.run("generate", "--checkpoint", checkpoint, "--prompt", "a", "--max-new-tokens", "1")
    assert used.code == 0 and not (place / "PWNED").exists(), used.err  # generating reads no data
    named = box.run("eval", "--checkpoint", checkpoint, "eval_loader.dataset.filter=evil.py:keep")
    assert named.code == 0 and (place / "PWNED").exists(), named.err
    (place / "PWNED").unlink()


@pytest.mark.parametrize("words", OPENED[:-1], ids=lambda words: " ".join(words[:2]))
def test_the_code_of_a_tokenizer_never_runs(box: Box, place: Path, run: Path, words: tuple[str, ...]) -> None:
    checkpoint = copied(run, "tokenizer_code") / "checkpoints" / "step-6"
    evil = "from transformers import PreTrainedTokenizerFast\nclass T(PreTrainedTokenizerFast): pass\n"
    (checkpoint / "tokenizer" / "evil.py").write_text(EVIL + evil)
    said = checkpoint / "tokenizer" / "tokenizer_config.json"
    code = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    said.write_text(json.dumps(json.loads(said.read_text()) | code))
    sign(checkpoint)
    ended = box.run(*(str(checkpoint) if word == "RUN" else word for word in words), "--allow-code")
    assert not (place / "PWNED").exists() and not (place / "OUT").exists()
    assert ended.code == 2 and len(ended.lines) == 1, ended
