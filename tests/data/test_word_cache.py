"""Words from the cache have the ids that the tokenizer gives them in their text."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmfoundry.data import PythonStdlibConfig, word_cache
from llmfoundry.data.word_cache import WordCache

KINDS = ("gpt2", "llama3", "qwen")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    source = PythonStdlibConfig(name="python_stdlib", split="validation").build()
    return [text[:20_000] for text in source.documents()][:60]


def trained(kind: str, texts: list[str], *added: AddedToken) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    if kind == "gpt2":
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = {"llama3": word_cache._LLAMA3, "qwen": word_cache._QWEN}[kind]
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if kind == "qwen":
        bpe.normalizer = normalizers.NFC()
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens(list(added))
    bpe.encode_special_tokens = True
    return bpe


def made_up(seed: int) -> Iterator[str]:
    """Texts of what patterns treat differently, in every order."""
    rng = random.Random(seed)
    ascii = ["a", "Bc", "def", " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x00", "'", "'s", "'LL",
             "'Ve", "0", "12", "1234", "_", "(", ").", "--", "don't", "I'M", "<eos>", "\x7f"]  # fmt: skip
    other = [
        "é",
        "e\u0301",
        "ſ",
        "ß",
        "你好",
        "🙂",
        "\u00a0",
        "\u3000",
        "\u0085",
        "\u2028",
        "²",
        "Ⅷ",
        "\u200d",
        "İ",
        "क्षि",
    ]
    for i in range(1500):
        known = ascii if i % 2 else ascii + other
        yield "".join(rng.choice(known) for _ in range(rng.randint(0, 30)))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_tokenizers_own(kind: str, texts: list[str]) -> None:
    bpe = trained(kind, texts)
    cache = WordCache.of(bpe)
    assert cache is not None
    everything = [*texts, *made_up(17), ""]
    for _ in range(2):  # the second time from the cache
        for text, found in zip(everything, cache.ids(everything), strict=True):
            assert found.tolist() == bpe.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_a_text_may_spell_are_found(kind: str, texts: list[str]) -> None:
    added = [AddedToken("<tool call>", normalized=False), AddedToken("ab", lstrip=True), AddedToken("é")]
    bpe = trained(kind, texts, *added)
    cache = WordCache.of(bpe)
    assert cache is not None
    spelled = [f"x {token} y, e\u0301  {token}{token} <eos>" for token in ("<tool call>", "ab", "é", "cab")]
    for text, found in zip([*spelled, *made_up(3)], cache.ids([*spelled, *made_up(3)]), strict=True):
        assert found.tolist() == bpe.encode(text, add_special_tokens=False).ids, repr(text)


def test_a_full_cache_stays_right(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_MOST", 50)
    bpe = trained("gpt2", texts)
    cache = WordCache.of(bpe)
    assert cache is not None
    for _ in range(2):
        found = np.concatenate(cache.ids(texts)).tolist()
        assert found == [i for text in texts for i in bpe.encode(text, add_special_tokens=False).ids]
    assert len(cache._ids) == 50


def test_other_tokenizers_are_not_cached(texts: list[str]) -> None:
    bpe = trained("gpt2", texts)
    for other in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)]),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\S+| "), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        ),
    ):
        bpe.pre_tokenizer = other
        assert WordCache.of(bpe) is None
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert WordCache.of(bpe) is not None
    bpe.normalizer = normalizers.Lowercase()
    assert WordCache.of(bpe) is None
