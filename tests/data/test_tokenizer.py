"""The trained tokenizer is exact and the same everywhere; others are loaded as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmfoundry.config import ConfigError, check
from llmfoundry.data import DatasetConfig, TokenizerConfig
from llmfoundry.data import tokenizer as module
from llmfoundry.data.tokenizer import Encoder, pieces

TEXTS = [
    "def f(x):\n\treturn  x  # spaces\r\n\n\n",
    "",
    " leading, trailing ",
    "héllo wörld — 日本語 🙂‍↔️ \u0000\x7f\ufffe",
    "".join(map(chr, range(0x250))),
    "<|endoftext|> is only text here",
    " isn't it ? yes . no , n't 's",
]


def synthetic(cache: Path, **keys: object) -> DatasetConfig:
    return check(DatasetConfig, {"name": "synthetic", "n_documents": 100, "cache_dir": str(cache)} | keys)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bpe(cache: Path) -> PreTrainedTokenizerBase:
    return TokenizerConfig(vocab_size=300).build(synthetic(cache))


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back_exactly(bpe: PreTrainedTokenizerBase, text: str) -> None:
    (ids,) = Encoder(bpe).encode([text])
    assert bpe.decode(ids) == text
    assert bpe.decode(bpe(text)["input_ids"]) == text


def test_end_of_text_is_token_zero_and_never_read_out_of_a_document(bpe: PreTrainedTokenizerBase) -> None:
    assert (bpe.eos_token, bpe.eos_token_id, len(bpe)) == ("<|endoftext|>", 0, 300)
    assert 0 not in Encoder(bpe).encode(["a<|endoftext|>b"])[0]
    assert 0 in bpe("a<|endoftext|>b")["input_ids"], "the tokenizer itself is left as it was"


def test_training_does_not_see_the_validation_split(cache: Path, bpe: PreTrainedTokenizerBase) -> None:
    other = TokenizerConfig(vocab_size=300).build(synthetic(cache, split="validation"))
    assert Encoder(other).fingerprint() == Encoder(bpe).fingerprint()


def test_second_use_reads_the_cache(cache: Path, bpe: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train_bpe", None)
    again = TokenizerConfig(vocab_size=300).build(synthetic(cache))
    assert Encoder(again).fingerprint() == Encoder(bpe).fingerprint()


def test_saved_tokenizer_loads_by_folder_name(cache: Path, tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    bpe.save_pretrained(tmp_path)
    loaded = TokenizerConfig(name=str(tmp_path), kwargs={"model_max_length": 77}).build(synthetic(cache))
    assert loaded.model_max_length == 77 and loaded.eos_token_id == bpe.eos_token_id
    elsewhere = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (loaded, elsewhere):
        assert Encoder(tokenizer).encode(TEXTS) == Encoder(bpe).encode(TEXTS)
        for text in TEXTS:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_written_in_python_works(cache: Path, tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = TokenizerConfig(name=str(tmp_path)).build(synthetic(cache))
    assert not tokenizer.is_fast
    (ids,) = Encoder(tokenizer).encode(["héllo"])
    assert tokenizer.decode(ids) == "héllo" and tokenizer.eos_token_id not in ids
    assert len(Encoder(tokenizer).fingerprint()) == 64


def test_tokenizer_without_end_of_text_is_refused_or_told_one(cache: Path, tmp_path: Path) -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "stop": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no end-of-text token.*kwargs.eos_token"):
        TokenizerConfig(name=str(tmp_path)).build(synthetic(cache))
    told = TokenizerConfig(name=str(tmp_path), kwargs={"eos_token": "stop"}).build(synthetic(cache))
    assert told.eos_token_id == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("nobody/nothing", "neither a folder nor on the Hugging Face hub"),
    ],
)
def test_tokenizer_that_is_nowhere_is_named(cache: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer.name: {name}: {message}") as caught:
        TokenizerConfig(name=name).build(synthetic(cache))
    assert "\n" not in str(caught.value)


def test_folder_without_a_tokenizer_is_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        TokenizerConfig(name=str(tmp_path)).build(synthetic(cache))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vocab_size": 256}, "vocab_size: "),
        ({"vocab_size": 10**12}, "vocab_size: "),  # the library aborts the process
        ({"name": "gpt2", "vocab_size": 4096}, "'gpt2' brings its own"),
        ({"name": "gpt2", "kwargs": {"trust_remote_code": True}}, "never run"),
        ({"nmae": "bpe"}, "did you mean 'name'"),
    ],
)
def test_bad_keys_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(TokenizerConfig, keys)


def test_no_text_leaves_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no text"):
        TokenizerConfig().build(synthetic(tmp_path / "cache", validation_fraction=1))
    assert not (tmp_path / "cache").exists()


def test_no_text_to_validate_on_is_found_before_training(tmp_path: Path) -> None:
    data = synthetic(tmp_path / "cache", validation_fraction=0)
    with pytest.raises(ConfigError, match="synthetic-validation: holds no text"):
        TokenizerConfig(vocab_size=300).build(data, [data.of_split("validation")])
    assert not (tmp_path / "cache").exists()


def test_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="set cache_dir or LLMFOUNDRY_CACHE"):
        TokenizerConfig(vocab_size=300).build(synthetic(tmp_path / "file"))


def test_damaged_cache_is_named(tmp_path: Path) -> None:
    TokenizerConfig(vocab_size=300).build(synthetic(tmp_path))
    (path,) = tmp_path.rglob("tokenizer.json")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is damaged; delete the folder"):
        TokenizerConfig(vocab_size=300).build(synthetic(tmp_path))


def test_cache_folder_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path))
    TokenizerConfig(vocab_size=300).build(check(DatasetConfig, {"name": "synthetic", "n_documents": 20}))
    assert list(tmp_path.glob("tokenizers/bpe-300-*/tokenizer.json"))


def test_long_documents_are_cut_after_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 6)
    assert list(pieces("ab\ncd\nefg")) == ["ab\ncd\n", "efg"]
    assert list(pieces("abcdefgh\ni")) == ["abcdef", "gh\ni"]
    assert list(pieces("")) == [""]


def test_training_stops_after_a_bounded_amount_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAIN_CHARACTERS", 10)
    taken = list(module._first(["abcdef", "ghijkl", "mnopqr"], 10))
    assert taken == ["abcdef", "ghijkl"]
