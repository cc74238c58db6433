"""A run whose save_folder is in a store: what goes there, what half an upload is, and going on from there elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_run import metrics_of, recipe  # noqa: F401

from llmfoundry.checkpoint.checkpointer import read
from llmfoundry.cli.inference import generate_main
from llmfoundry.cli.train import train_main

SHORT = ["eval_interval=0ba", "save_interval=2ba", "max_duration=6ba", "scheduler.t_max=8ba"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "machine"))
    return tmp_path / "machine"


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store/run"
        return
    yield "memory://bucket/run"
    if fsspec.filesystem("memory").exists("/bucket"):
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def tree(url: str) -> set[str]:
    """The names of all files below a URL."""
    fs, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(path).removeprefix("/") for name in fs.find(path)}


def steps(url: str) -> set[str]:
    return {name.split("/")[1] for name in tree(url) if name.startswith("checkpoints/")}


def test_a_run_goes_on_from_a_store_on_a_machine_that_has_nothing(
    recipe: Path, tmp_path: Path, cache: Path, url: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    assert train_main([str(recipe), *SHORT]) == 0
    assert train_main([str(recipe), *SHORT, "max_duration=4ba", f"save_folder={url}"]) == 0
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html"} <= tree(url)
    assert steps(url) == {"step-2", "step-4"}
    assert not list(cache.rglob("*.safetensors")), "nothing stays here that the store has"
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "another"))
    assert train_main([str(recipe), *SHORT, f"save_folder={url}", "autoresume=true"]) == 0
    assert steps(url) == {"step-2", "step-4", "step-6"}
    fs, path = fsspec.core.url_to_fs(url)
    fs.get(f"{path}/", str(tmp_path / "copy"), recursive=True)
    assert metrics_of(tmp_path / "copy") == metrics_of(tmp_path / "run")
