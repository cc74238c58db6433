"""Tokenised by one process, by several, in parts or after a kill: the same stream, with the same counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmfoundry.config import ConfigError, check
from llmfoundry.data import DatasetConfig, TokenStream, parts
from llmfoundry.data.packing import prepare, prepare_part
from llmfoundry.data.parts import Share, _bounds
from llmfoundry.data.tokenizer import PLAIN_TEXT, SpecialTokens
from tests.data.chat_tokenizer import tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Seven files of different sizes; every fifth text stands in the file before too, some are empty or short."""
    root = tmp_path / "texts"
    root.mkdir()
    number = 0
    for file, size in enumerate([30, 5, 60, 1, 20, 40, 10]):
        rows = []
        for i in range(size):
            number += 1
            text = f"document number {number} " + "says é more " * (number % 13)
            rows.append("" if i % 9 == 8 else f"repeated {i}" if i % 5 == 4 else text)
        (root / f"{file}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (root / "keep.py").write_text("def keep(text: str) -> bool:\n    return 'number 7' not in text\n")
    yield root
    sys.modules.pop("llmfoundry_plugin_keep", None)


def dataset(folder: Path, cache: str, **keys: object) -> DatasetConfig:
    data = {"name": "text_files", "path": f"{folder}/*.jsonl", "validation_fraction": 0.0}
    return check(DatasetConfig, data | {"cache_dir": str(folder.parent / cache)} | keys)


def everything(stream: TokenStream | None) -> list[int]:
    assert stream is not None
    stream.verify()
    return stream.read(0, stream.n_tokens).tolist()


@pytest.mark.parametrize("rules", [{}, {"dedup": True, "filter": "keep"}], ids=["all", "sieved"])
@pytest.mark.parametrize("special", [PLAIN_TEXT, SpecialTokens(bos=1)], ids=["eos", "bos"])
def test_workers_and_parts_give_the_same_stream(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rules: dict[str, object], special: SpecialTokens
) -> None:
    if rules:
        rules = rules | {"filter": f"{folder}/keep.py:keep"}
    whole = prepare(dataset(folder, "whole", **rules), tokenizer(), special)
    monkeypatch.setattr(parts, "SHARD_TOKENS", 300)
    monkeypatch.setattr("llmfoundry.data.encoding.WORKER_CHARACTERS", 500)
    for workers in (1, 2):
        other = prepare(dataset(folder, f"workers{workers}", **rules), tokenizer(), special, workers)
        assert everything(other) == everything(whole) and other.counts == whole.counts
        assert other.fingerprint == whole.fingerprint
    cut = dataset(folder, "cut", **rules)
    assert prepare_part(cut, tokenizer(), special, Share(2, 3), 1) is None
    assert prepare_part(cut, tokenizer(), special, Share(3, 3), 1) is None
    stream = prepare_part(cut, tokenizer(), special, Share(1, 3), 2)
    assert everything(stream) == everything(whole) and stream is not None and stream.counts == whole.counts
    assert stream.read(299, 1301).tolist() == everything(whole)[299:1301]
    assert [path.name for path in stream.folder.parent.glob("*.part-*")] == []


def test_what_is_left_out_is_counted(folder: Path) -> None:
    texts = list(dataset(folder, "x").build().read())
    kept = [text for text in dict.fromkeys(texts) if text and "number 7" not in text]
    keys = {"dedup": True, "filter": f"{folder}/keep.py:keep"}
    counts = prepare(dataset(folder, "cache", **keys), tokenizer(), workers=1).counts
    assert counts is not None and counts.read == len(texts) and counts.kept == len(kept)
    assert counts.empty == texts.count("") and counts.kept_bytes == len("".join(kept).encode())
    assert counts.read == counts.empty + counts.duplicates + counts.filtered + counts.kept
    assert counts.filtered == sum("number 7" in text for text in set(texts))
    assert list(dataset(folder, "x", **keys).build().documents()) == kept
    (folder / "keep.py").write_text("def keep(text: str) -> bool:\n    return False\n")
    sys.modules.pop("llmfoundry_plugin_keep")
    with pytest.raises(ConfigError, match="holds no text; .*or check dedup and filter"):
        prepare(dataset(folder, "cache", **keys), tokenizer())


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_killed_run_goes_on_after_its_last_shard(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dedup: bool, stop: int
) -> None:
    whole = everything(prepare(dataset(folder, "whole", dedup=dedup), tokenizer()))
    monkeypatch.setattr(parts, "SHARD_TOKENS", 700)
    saved = parts._Writer._save
    states: list[parts.State] = []

    def killed(self: parts._Writer, state: parts.State) -> None:
        saved(self, state)
        states.append(state)
        if len(states) == stop:
            raise KeyboardInterrupt

    config = dataset(folder, "cache", dedup=dedup)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts._Writer, "_save", killed)
        prepare(config, tokenizer(), workers=1)
    (left,) = (folder.parent / "cache" / "tokens").glob("*.part-1-of-1")
    assert len(list(left.glob("tokens-*.bin"))) == stop
    encoded: list[int] = []
    of_encoder = parts.encoded
    monkeypatch.setattr(
        parts, "encoded", lambda *args: ((encoded.append(len(ids)), (text, ids))[1] for text, ids in of_encoder(*args))
    )
    stream = prepare(config, tokenizer(), workers=1)
    assert everything(stream) == whole and not left.exists()
    assert sum(encoded) < len(whole) - 700 * stop + 200, "documents of whole shards are not tokenised again"
    assert stream.counts == prepare(dataset(folder, "whole", dedup=dedup), tokenizer()).counts


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys, itertools, numpy\nfrom llmfoundry.data import *\nfrom llmfoundry.data.encoding import encoded\n"
        "from llmfoundry.data.tokenizer import Encoder\nfrom llmfoundry.data.sieve import Counts\n"
        "from tests.data.chat_tokenizer import tokenizer\n"
        "texts = ((f'text {i} ' * 50_000, Counts(i)) for i in itertools.count())\n"
        "for i, _ in enumerate(encoded(texts, Encoder(tokenizer()), numpy.dtype('<u2'), 2)):\n"
        "    if i == 3: print('works', flush=True)"
    )
    command = [sys.executable, "-c", code]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert running.stdout is not None and running.stdout.readline() == "works\n"
    tasks = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert len(tasks) == 2
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{task}").exists() for task in tasks) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{task}").exists() for task in tasks)


def test_files_are_divided_by_their_bytes() -> None:
    for sizes in ([1] * 10, [100, 1, 1, 1], [1, 1, 1, 100], [5, 0, 0, 5, 3], [7] * 4):
        for n in range(1, len(sizes) + 1 if len(sizes) < 5 else 5):
            bounds = _bounds(sizes, n)
            assert (
                bounds[0] == 0
                and bounds[-1] == len(sizes)
                and all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
            )
    assert _bounds([1] * 9, 3) == [0, 3, 6, 9]


def test_mistakes_are_named(folder: Path) -> None:
    for text in ("0/3", "4/3", "2", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match="write I/N"):
            Share.parse(text)
    with pytest.raises(ConfigError, match="has 7 files that can be divided; ask for no more parts"):
        prepare_part(dataset(folder, "c"), tokenizer(), PLAIN_TEXT, Share(1, 8), 1)
    with pytest.raises(ConfigError, match="filter: nowhere:f: cannot be imported"):
        dataset(folder, "c", filter="nowhere:f").build()
    with pytest.raises(ConfigError, match="write package.module:function or file.py:function"):
        dataset(folder, "c", filter="nowhere").build()
