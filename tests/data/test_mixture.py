"""Mixtures: which rows they are made of, and what their settings mean."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from llmfoundry.config import ConfigError, check, dump
from llmfoundry.data import DatasetConfig, Loader, LoaderConfig, MixtureConfig, TokenizerConfig
from llmfoundry.data.mixture import Mixture
from llmfoundry.data.rows import Order
from llmfoundry.data.sources import check_apart, paired_run

LENGTH = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def source(cache: Path, seed: int, **keys: object) -> dict[str, object]:
    text = {"name": "synthetic", "n_documents": 20 + 10 * seed, "document_words": 30, "vocab_size": 20 + seed}
    return text | {"seed": seed, "cache_dir": str(cache), "label": f"s{seed}"} | keys


def build(parts: list[dict[str, object]], *, documents: bool = False, seed: int = 0, **keys: object) -> Loader:
    config = check(LoaderConfig, {"datasets": parts} | keys)
    tokenizer = TokenizerConfig(vocab_size=300).build(config.dataset.parts()[0])
    return config.build(tokenizer, seed=seed, max_seq_len=LENGTH, sequence_ids=documents)


def alone(part: dict[str, object], first: dict[str, object], seed: int = 0) -> Loader:
    dataset = {key: value for key, value in part.items() if key not in ("label", "weight", "tokens", "epochs")}
    of_tokenizer = {key: value for key, value in first.items() if key not in ("label", "weight", "tokens", "epochs")}
    tokenizer = TokenizerConfig(vocab_size=300).build(check(DatasetConfig, of_tokenizer))
    return check(LoaderConfig, {"dataset": dataset}).build(tokenizer, seed=seed, max_seq_len=LENGTH)


def order_of(loader: Loader) -> Mixture:
    assert isinstance(loader.order, Mixture)
    return loader.order


def test_rows_are_those_of_each_source_alone(cache: Path) -> None:
    parts = [source(cache, 1, weight=0.7), source(cache, 2, weight=0.2), source(cache, 3, weight=0.1)]
    batch = build(parts).batch(0, 400)
    assert batch.sources is not None and np.bincount(batch.sources).tolist() == [280, 80, 40]
    for i, part in enumerate(parts):
        mine = batch.sources == i
        expected = alone(part, parts[0]).batch(0, int(mine.sum()))
        assert torch.equal(batch.tokens[mine], expected.tokens) and torch.equal(batch.labels[mine], expected.labels)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_rows_do_not_depend_on_ranks_or_batch_sizes(cache: Path, world: int) -> None:
    loader = build([source(cache, i, weight=w) for i, w in ((1, 0.61), (2, 0.38), (3, 0.01))], documents=True)
    whole = loader.batch(1003, 24)
    ranks = [loader.batch(1003, 24, rank, world) for rank in range(world)]
    steps = [loader.batch(start, 8) for start in (1003, 1011, 1019)]
    for parts in (ranks, steps):
        for field, expected in zip(zip(*parts, strict=True), whole, strict=True):
            if expected is not None:
                assert torch.equal(torch.cat(field), expected)
    assert whole.sources is not None and whole.sequence_ids is not None


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_without_weights_sizes_count_and_temperature_evens_them_out(cache: Path, temperature: float) -> None:
    loader = build([source(cache, 1), source(cache, 5)], temperature=temperature)
    sizes = np.array([alone(source(cache, i), source(cache, 1)).rows_per_epoch for i in (1, 5)], dtype=float)
    shares = sizes ** (1 / temperature) / (sizes ** (1 / temperature)).sum()
    assert np.allclose(order_of(loader).counts(10_000) / 10_000, shares, atol=2e-4)
    assert loader.rows_per_epoch == sizes.sum()


def test_shares_by_temperature_are_the_same_on_every_machine() -> None:
    orders = [Order()] * 2

    def shares(temperature: float, *weights: float) -> list[list[int]]:
        parts = [{"label": str(i), "name": "synthetic", "weight": weight} for i, weight in enumerate(weights)]
        config = check(MixtureConfig, {"name": "mixture", "datasets": parts, "temperature": temperature})
        return config.shares(orders)

    assert shares(2.0, 4.0, 9.0) == [[2, 3]] and shares(0.5, 1.0, 3.0) == [[1, 9]]
    assert shares(3.0, 5.0, 7.0) == [[494_917, 553_659]]
    for weight in (1e-300, 1e300):
        with pytest.raises(ConfigError, match=r"temperature=0.01 makes of weights 0 or infinity; raise it"):
            shares(0.01, weight, 1.0)


def test_budgets_are_what_the_run_reads(cache: Path) -> None:
    loader = build([source(cache, 1, tokens=LENGTH * 30), source(cache, 2, epochs=1.5)])
    rows = int(1.5 * alone(source(cache, 2), source(cache, 1)).rows_per_epoch)
    assert loader.rows_per_epoch == 30 + rows
    assert order_of(loader).taken(30 + rows) == {"s1": 30, "s2": rows}
    order_of(loader).check(30 + rows)
    with pytest.raises(ConfigError, match="s1: the run would read .* tokens of it, and its budget is 480; shorten"):
        order_of(loader).check(2 * (30 + rows))


def test_reading_a_source_too_often_is_refused(cache: Path) -> None:
    loader = build([source(cache, 1, weight=0.9, max_epochs=2), source(cache, 2, weight=0.1)])
    rows = alone(source(cache, 1), source(cache, 1)).rows_per_epoch
    order_of(loader).check(int(2 * rows / 0.9))
    with pytest.raises(ConfigError, match=r"s1: the run reads it 4 times \(max_epochs=2\); lower its weight"):
        order_of(loader).check(int(4 * rows / 0.9))


def test_phases_change_the_shares(cache: Path) -> None:
    phases = [{"until": "10ba", "weights": {"s1": 0.9, "s2": 0.1}}, {"weights": {"s2": 0.5, "s3": 0.5}}]
    parts = [source(cache, i) for i in (1, 2, 3)]
    mixture = order_of(build(parts, mixture=phases))
    mixture.arrange([100])
    sources = mixture.read(np.arange(200)).sources
    assert sources is not None
    assert np.bincount(sources[:100]).tolist() == [90, 10] and np.bincount(sources[100:]).tolist() == [0, 50, 50]
    assert mixture.taken(150) == {"s1": 90, "s2": 35, "s3": 25}
    second = mixture.read(np.arange(200))
    rows = second.tokens[sources == 1]  # a source goes on where the phase before left it
    assert np.array_equal(rows, alone(parts[1], parts[0]).batch(0, 60).tokens.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: {"weight": 0.5}}, "s1 has weight and s2 does not; give it to all, or to none"),
        ({0: {"weight": 0.5, "tokens": 1e6}}, "weight and tokens both say how much of it is read; keep one"),
        ({0: {"weight": 0.5}, 1: {"epochs": 1.0}}, "s1 has weight and s2 does not"),
        ({0: {"label": "s2"}}, "two are called 's2'; give each a label"),
        ({1: {"label": "total"}}, "'total' cannot be a label: loss/train/total is the loss of all datasets together"),
        ({1: {"label": "a/b"}}, "'a/b' cannot be a label"),
        ({0: {"weight": -1.0}}, "^datasets.0.weight: input should be greater than 0"),
        ({0: {"wieght": 0.5}}, r"^datasets.0.wieght: unknown key \(did you mean 'weight'\?\)"),
    ],
)  # fmt: skip
def test_mistakes_are_named(cache: Path, change: dict[int, dict[str, object]], message: str) -> None:
    parts = [source(cache, i + 1) | change.get(i, {}) for i in range(2)]
    with pytest.raises(ConfigError, match=message):
        check(LoaderConfig, {"datasets": parts})


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"weights": {"web": 1.0}}], "'web' is not a dataset; known: s1, s2"),
        (
            [{"weights": {"s1": 1.0}}, {"weights": {"s2": 1.0}}],
            "mixture.0.until: is missing; only the last phase has none",
        ),
        ([{"weights": {"s1": 0.0}}], "must be positive"),
    ],
)
def test_mistakes_in_phases_are_named(cache: Path, phases: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(LoaderConfig, {"datasets": [source(cache, 1), source(cache, 2)], "mixture": phases})


def test_config_survives_its_dump(cache: Path) -> None:
    config = check(LoaderConfig, {"datasets": [source(cache, 1, weight=0.5), source(cache, 2, weight=1.5)]})
    assert check(LoaderConfig, dump(config)) == config
    assert isinstance(config.dataset, MixtureConfig) and config.dataset.labels == ["s1", "s2"]


def test_labels_come_from_folders_where_none_is_given(tmp_path: Path) -> None:
    parts = [{"name": "text_files", "path": f"{tmp_path}/{name}"} for name in ("web", "books.jsonl.zst", "code/")]
    config = check(LoaderConfig, {"datasets": parts}).dataset
    assert isinstance(config, MixtureConfig) and config.labels == ["web", "books", "code"]


def test_what_a_source_shares_with_an_evaluation_is_held_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = "".join(f'{{"text": "{name} {i} is a line of text"}}\n' for i in range(200))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    a, b = ({"name": "text_files", "path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b"))
    train = check(LoaderConfig, {"datasets": [a | {"weight": 1.0}, b | {"weight": 1.0}]}).dataset
    train, (held_out,) = paired_run(train, [check(DatasetConfig, b)])
    assert [part.validation_fraction for part in train.parts()] == [0.0, 0.05] and held_out.split == "validation"
    check_apart(train, held_out)
    texts = [set(part.build().documents()) for part in (*train.parts(), held_out)]
    assert len(texts[0]) == 200 and texts[1].isdisjoint(texts[2]) and len(texts[1] | texts[2]) == 200
    with pytest.raises(ConfigError, match="holds the same documents"):
        check_apart(train, check(DatasetConfig, b | {"validation_fraction": 0.05}))


def test_a_tokenizer_learns_from_all_sources(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name * 10} {i:03}"}}\n' for i in range(100)))
    whole = {"name": "text_files", "validation_fraction": 0.0}
    parts = [whole | {"path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in (("a", 3.0), ("b", 1.0))]
    texts = list(check(LoaderConfig, {"datasets": parts}).dataset.build().documents())
    assert len(texts) == 200 and sum("a" in text for text in texts[:80]) == 60


def test_the_yaml_of_the_page_on_data_is_accepted() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = [data for data in map(yaml.safe_load, blocks) if "train_loader" in data]
    assert len(found) == 8
    for data in found:
        check(LoaderConfig, data["train_loader"])
        for part in data.get("eval_loaders", []):
            check(LoaderConfig, part)
