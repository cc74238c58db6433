"""The n-th row depends on (seed, n) alone, and one pass covers every label once."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from llmfoundry.config import ConfigError, check
from llmfoundry.data import IGNORE, Batch, DatasetConfig, Loader, LoaderConfig, TokenizerConfig, TokenStream
from llmfoundry.data.permutation import permuted, permuted_in_blocks


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def build(cache: Path, *, seed: int = 0, sequence_ids: bool = False, **keys: object) -> Loader:
    data = {"name": "synthetic", "n_documents": 40, "document_words": 30, "cache_dir": str(cache)}
    of_data = {"split", "max_seq_len", "shuffle", "shuffle_seed"}
    data |= {key: value for key, value in keys.items() if key in of_data}
    rest = {key: value for key, value in keys.items() if key not in of_data}
    tokenizer = TokenizerConfig(vocab_size=300).build(check(DatasetConfig, data))
    config = check(LoaderConfig, {"name": "text", "dataset": data} | rest)
    return config.build(tokenizer, seed=seed, max_seq_len=16, sequence_ids=sequence_ids)


def stream_of(loader: Loader) -> list[int]:
    stream: TokenStream = loader.order.once.stream
    return stream.read(0, stream.n_tokens).tolist()


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*(batch[:3] for batch in batches), strict=True)))


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permutation_hits_every_place_once(n: int) -> None:
    assert sorted(permuted(np.arange(n), n, seed=3).tolist()) == list(range(n))


def test_permutation_is_the_same_for_a_part_and_for_the_whole() -> None:
    whole = permuted(np.arange(1000), 1000, seed=3)
    assert np.array_equal(permuted(np.arange(137, 200), 1000, seed=3), whole[137:200])
    assert int(permuted(np.array([2**40]), 2**40 + 1, seed=3)[0]) <= 2**40


def test_permutation_looks_random() -> None:
    """Over 1200 seeds each of 6 places gets each value 200 times; 5 standard deviations (12.9) allowed."""
    counts = np.zeros((6, 6))
    for seed in range(1200):
        counts[np.arange(6), permuted(np.arange(6), 6, seed)] += 1
    assert np.abs(counts - 200).max() < 65
    n = 10_000
    order = permuted(np.arange(n), n, seed=1)
    correlation = np.corrcoef(np.arange(n), order)[0, 1]
    steps = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 0.05 and abs(steps) < 0.05  # 5 standard deviations: 1 / sqrt(n) each


def test_labels_are_the_next_tokens(cache: Path) -> None:
    loader = build(cache, shuffle=False)
    stream = stream_of(loader)
    batch = loader.batch(2, 3)
    assert batch.tokens.tolist() == [stream[i * 16 : i * 16 + 16] for i in (2, 3, 4)]
    assert batch.labels.tolist() == [stream[i * 16 + 1 : i * 16 + 17] for i in (2, 3, 4)]
    assert batch.rows.tolist() == [2, 3, 4] and batch.sequence_ids is None
    assert {part.dtype for part in batch[:3]} == {torch.int64}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_rows_do_not_depend_on_ranks_or_batch_sizes(cache: Path, world: int) -> None:
    loader = build(cache)
    whole = loader.batch(5, 24)
    ranks = [loader.batch(5, 24, rank, world) for rank in range(world)]
    steps = [loader.batch(start, 8) for start in (5, 13, 21)]
    uneven = [loader.batch(5, 7, rank, world) for rank in range(world)] + [loader.batch(12, 17)]
    assert equal(joined(ranks), whole) and equal(joined(steps), whole) and equal(joined(uneven), whole)
    assert equal(joined(whole.split(5)), whole) and [len(part.rows) for part in whole.split(5)] == [5] * 4 + [4]


def test_every_epoch_has_all_rows_in_another_order(cache: Path) -> None:
    loader = build(cache)
    n = loader.rows_per_epoch
    plain = build(cache, shuffle=False).batch(0, n).tokens.tolist()
    epochs = [loader.batch(epoch * n, n).tokens.tolist() for epoch in range(3)]
    assert all(sorted(epoch) == sorted(plain) for epoch in epochs)
    assert len({str(epoch) for epoch in [plain, *epochs]}) == 4


def test_batch_across_an_epoch_end_is_both_sides(cache: Path) -> None:
    loader = build(cache)
    n = loader.rows_per_epoch
    assert equal(loader.batch(n - 3, 8), joined([loader.batch(n - 3, 3), loader.batch(n, 5)]))
    many = loader.batch(n - 1, 2 * n)
    assert equal(many, joined([loader.batch(n - 1, 1), loader.batch(n, n), loader.batch(2 * n, n - 1)]))


def test_order_follows_the_seed(cache: Path) -> None:
    first = build(cache, seed=1).batch(0, 8)
    assert equal(build(cache, seed=1).batch(0, 8), first)
    assert not equal(build(cache, seed=2).batch(0, 8), first)
    assert equal(build(cache, seed=2, shuffle_seed=1).batch(0, 8), first)


def test_only_training_is_shuffled_unless_asked(cache: Path) -> None:
    validation = build(cache, split="validation")
    assert validation.batch(0, 2).tokens.flatten().tolist() == stream_of(validation)[:32]
    train = build(cache)
    assert train.batch(0, 2).tokens.flatten().tolist() != stream_of(train)[:32]


def test_drop_last_leaves_out_the_partly_filled_row(cache: Path) -> None:
    loader, dropping = build(cache), build(cache, drop_last=True)
    n = dropping.rows_per_epoch
    assert loader.n_tokens % 16, "the test needs a partly filled row"
    assert n == loader.rows_per_epoch - 1 == loader.n_tokens // 16
    plain = sorted(build(cache, shuffle=False).batch(0, n).labels.tolist())
    for epoch in range(3):
        assert sorted(dropping.batch(epoch * n, n).labels.tolist()) == plain
    assert loader.batch(0, loader.rows_per_epoch).n_labels == loader.n_tokens


@pytest.mark.parametrize("n_rows", [1, 4, 6, 1000])
@pytest.mark.parametrize("drop_last", [False, True])
def test_one_pass_covers_every_label_once_in_order(cache: Path, n_rows: int, drop_last: bool) -> None:
    loader = build(cache, split="validation", drop_last=drop_last)
    batches = list(loader.one_pass(n_rows))
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    tokens = torch.cat([batch.tokens.flatten() for batch in batches])
    counts = labels != IGNORE
    assert labels[counts].tolist() == stream_of(loader)[1:] and tokens[counts].tolist() == stream_of(loader)[:-1]
    assert {batch.tokens.shape for batch in batches} == {(n_rows, 16)}
    assert (torch.cat([batch.rows for batch in batches]) == torch.arange(len(batches) * n_rows)).all()


@pytest.mark.parametrize("world", [2, 4])
def test_one_pass_over_ranks_has_equal_shapes_and_the_same_labels(cache: Path, world: int) -> None:
    loader = build(cache, split="validation")
    alone = list(loader.one_pass(8))
    ranks = [list(loader.one_pass(8, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for step, batch in enumerate(alone):
        assert equal(joined([batches[step] for batches in ranks]), batch)
    with pytest.raises(ValueError, match="not a multiple of world"):
        next(loader.one_pass(9, 0, world))


def test_reading_ahead_changes_nothing(cache: Path) -> None:
    plain, ahead = build(cache), build(cache, num_workers=4)
    asked = [(0, 4), (4, 4), (8, 4), (8, 4), (100, 6), (106, 2), (108, 2)]
    assert all(equal(plain.batch(*ask), ahead.batch(*ask)) for ask in asked)


def test_next_batch_is_read_ahead_in_one_thread(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, names = build(cache, num_workers=4), []
    gather = loader.gather
    monkeypatch.setattr(
        loader, "gather", lambda *where: names.append(threading.current_thread().name) or gather(*where)
    )
    for start in (0, 4, 8):
        loader.batch(start, 4, rank=1, world=2)
    loader._thread.shutdown()
    assert names == ["MainThread"] + ["read-ahead_0"] * 3


def test_sequence_ids_part_documents_at_end_of_text(cache: Path) -> None:
    loader = build(cache, shuffle=False, sequence_ids=True)
    batch = loader.batch(0, loader.rows_per_epoch)
    assert batch.sequence_ids is not None and batch.sequence_ids.dtype == torch.int32
    for tokens, ids in zip(batch.tokens.tolist(), batch.sequence_ids.tolist(), strict=True):
        document = 0
        for token, found in zip(tokens, ids, strict=True):
            document += token == 0
            assert found == document
    assert batch.sequence_ids[0, 0] == 1 and batch.sequence_ids.max() > 1
    part = batch.split(3)[1].to("cpu")
    assert part.sequence_ids is not None and torch.equal(part.sequence_ids, batch.sequence_ids[3:6])


def test_row_length_of_the_dataset_goes_before_the_runs(cache: Path) -> None:
    assert build(cache, max_seq_len=7).batch(0, 2).tokens.shape == (2, 7)


def test_too_little_text_for_one_row_is_named(cache: Path) -> None:
    with pytest.raises(ConfigError, match="do not fill one row of max_seq_len=1000000; lower max_seq_len"):
        build(cache, max_seq_len=1_000_000, drop_last=True)
    assert build(cache, max_seq_len=1_000_000).rows_per_epoch == 1


def test_missing_row_length_and_unknown_keys_are_named(cache: Path) -> None:
    data = {"name": "synthetic", "n_documents": 40, "document_words": 30, "cache_dir": str(cache)}
    config = check(LoaderConfig, {"dataset": data})
    with pytest.raises(ConfigError, match="dataset.max_seq_len: is missing"):
        config.build(TokenizerConfig(vocab_size=300).build(config.dataset), seed=0)
    with pytest.raises(ConfigError, match=r"dataset\.shufle: unknown key \(did you mean 'shuffle'\?\)"):
        check(LoaderConfig, {"dataset": data | {"shufle": True}})
    with pytest.raises(ConfigError, match=r"num_worker: unknown key \(did you mean 'num_workers'\?\)"):
        check(LoaderConfig, {"dataset": data, "num_worker": 2})


@pytest.mark.parametrize("n", [1, 5, 16, 100, 1000, 4097])
@pytest.mark.parametrize("block", [16, 48, 160, 10**6])
def test_blocks_are_permuted_and_read_from_few_places(n: int, block: int) -> None:
    images = permuted_in_blocks(np.arange(n), n, block, seed=3)
    assert sorted(images.tolist()) == list(range(n))
    cut = [permuted_in_blocks(np.arange(i, min(i + 37, n)), n, block, seed=3) for i in range(0, n, 37)]
    assert np.concatenate(cut).tolist() == images.tolist(), "a place is a function of its number alone"
    if n == 4097 and block == 160:
        parts = [np.sort(images[i : i + 160]) for i in range(0, 4000, 160)]
        assert all((np.diff(part) > 1).sum() < 2 * 16 for part in parts)
        assert (np.diff(images[:160]) == 1).mean() < 0.1
