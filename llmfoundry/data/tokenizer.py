"""Text to token ids: a byte-level BPE trained on the data at first use, or any Hugging Face tokenizer.

Either way the result is a `transformers` tokenizer with an end-of-text token, so checkpoints store it with
`save_pretrained` and every other tool can read it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmfoundry.config import Config, ConfigError
from llmfoundry.data.cache import made_once
from llmfoundry.data.sources import DatasetConfig
from llmfoundry.data.tables import lone_surrogate
from llmfoundry.data.tokenizer_files import load_tokenizer
from llmfoundry.data.word_cache import WordCache
from llmfoundry.progress import progress
from llmfoundry.runtime import cache_root, first_of_node

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# BPE is trained on this many characters at the start of the training split: more hardly changes the merges, but takes
# more time and memory.
TRAIN_CHARACTERS = 2**28
# The training time of BPE grows with the square of the longest word (5 s for 100,000 letters), so longer words and runs
# of spaces are cut for training. Encoding has no such limit.
_LONG_WORD = re.compile(r"\S{512}|\s{512}")
# Longer documents are tokenized in pieces cut at line ends, to bound memory.
PIECE_CHARACTERS = 2**22


class TokenizerConfig(Config):
    """`name: bpe` trains a tokenizer with `vocab_size` entries; any other name is a local folder or a hub id."""

    name: str = "bpe"  # bpe, a local folder, or a hub id
    # For bpe: 256 bytes, end of text, merges; None: 4096
    vocab_size: int | None = Field(default=None, ge=257, le=10**6)
    kwargs: dict[str, str | int | float | bool | None] = {}  # arguments of the tokenizer, e.g. {model_max_length: 2048}
    # Start each document with the BOS token. None: as in the checkpoint that the run starts from, or as the tokenizer
    # does.
    add_bos: bool | None = None
    # Encode text that spells a special token (`<|im_start|>`) as that token, not as characters. None: as in the
    # checkpoint that the run starts from; otherwise false, so that a text cannot end itself.
    parse_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.name != "bpe" and self.vocab_size is not None:
            raise ValueError(f"vocab_size is for 'bpe'; {self.name!r} brings its own, leave it out")
        if "trust_remote_code" in self.kwargs:
            raise ValueError("kwargs.trust_remote_code: code from a checkpoint is never run; leave it out")
        return self

    @classmethod
    def keys(cls, data: Mapping[str, object]) -> Set[str]:
        return cls.model_fields.keys() - (set() if data.get("name", "bpe") == "bpe" else {"vocab_size"})

    def build(self, dataset: DatasetConfig, also: Sequence[DatasetConfig] = ()) -> PreTrainedTokenizerBase:
        """Load the tokenizer, or train it first.

        Args:
            dataset: `bpe` is trained on the training split of this dataset, whichever split it names. The result is
                kept in its `cache_dir`.
            also: other datasets of the run. If one of them has no text, that is found before `bpe` is trained.

        Returns:
            A tokenizer with `eos_token_id` set; a `PreTrainedTokenizerFast` where one exists.

        Raises:
            ConfigError: if the tokenizer was not found or has no end-of-text token, or there is no text to train it on.
        """
        tokenizer = self._trained(dataset, also) if self.name == "bpe" else self.loaded()
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"tokenizer.name: {self.name}: has no end-of-text token, which separates documents; "
                "name one of its tokens in tokenizer.kwargs.eos_token"
            )
        return tokenizer

    def special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Return the rule for texts; what the YAML does not set follows the tokenizer.

        Raises:
            ConfigError: if `add_bos` is on, and the tokenizer has no BOS token.
        """
        adds = adds_bos(tokenizer) if self.add_bos is None else self.add_bos
        if adds and tokenizer.bos_token_id is None:
            raise ConfigError(
                "tokenizer.add_bos: the tokenizer has no BOS token; name one in tokenizer.kwargs.bos_token"
            )
        return SpecialTokens(tokenizer.bos_token_id if adds else None, bool(self.parse_special_tokens))

    def _trained(self, dataset: DatasetConfig, also: Sequence[DatasetConfig]) -> PreTrainedTokenizerFast:
        size = self.vocab_size or 4096
        source = dataset.of_split("train").build()
        key = f"bpe/2 {tokenizers.__version__} {size} {TRAIN_CHARACTERS} {source.fingerprint}"
        folder = cache_root(dataset.cache_dir) / "tokenizers" / f"bpe-{size}-{_sha256(key)[:24]}"
        documents = source.documents()
        if not folder.exists():
            # Missing data raises here, before the cache is touched.
            for other in also:
                next(other.build().documents())
            documents = itertools.chain([next(documents)], documents)

        def make(temporary: Path) -> None:
            log.info("training a byte-level BPE of %d entries on %s", size, source.title)
            total = None if source.n_bytes is None else min(source.n_bytes, TRAIN_CHARACTERS)
            with progress("reading text for the BPE", total, "bytes") as advance:
                text = train_bpe(_counted(documents, advance), size).to_str()
            (temporary / "tokenizer.json").write_text(text, encoding="utf-8")
            (temporary / "tokenizer.sha256").write_text(_sha256(text), encoding="utf-8")

        made_once(folder, make)
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            intact = (folder / "tokenizer.sha256").read_text(encoding="utf-8") == _sha256(text)
        except (OSError, UnicodeDecodeError):
            intact = False
        if not intact:
            raise ConfigError(f"{folder / 'tokenizer.json'}: is damaged; delete the folder {folder} to make it again")
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(text),
            **{"eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False} | self.kwargs,
        )

    def loaded(self) -> PreTrainedTokenizerBase:
        folder = Path(self.name).expanduser()
        looks_local = folder.is_dir() or self.name.startswith(("/", ".", "~")) or self.name.count("/") > 1
        if looks_local and not folder.is_dir():
            raise ConfigError(f"tokenizer.name: {self.name}: no such folder")
        where = f"tokenizer.name: {self.name}"
        if looks_local:
            return load_tokenizer(folder, where, **self.kwargs)
        return first_of_node(f"the tokenizer {self.name}", lambda: load_tokenizer(self.name, where, **self.kwargs))


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2).

    The same documents give the same tokenizer, whatever the threads and hash seeds. Every text can be
    encoded, and decoding restores it exactly. Token 0 is the end of text. A small corpus may yield fewer
    merges than requested.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (word for text in _first(documents, TRAIN_CHARACTERS) for word in _bounded(text))
    bpe.train_from_iterator(words, trainer)
    return bpe


class SpecialTokens(NamedTuple):
    """The rule for special tokens, the same for training, evaluation and generation.

    Attributes:
        bos: the id that opens each document; None: the end-of-text token of the document before it.
        parse: whether text that spells a special token becomes that token.
    """

    bos: int | None = None
    parse: bool = False


PLAIN_TEXT = SpecialTokens()


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer itself puts its BOS token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer.encode("a", add_special_tokens=True))[:1] == [bos]


class Encoder:
    """Encodes texts by a rule for special tokens. It adds no tokens, because a text may be part of a document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens = PLAIN_TEXT) -> None:
        self.special = special
        self._slow = None if tokenizer.is_fast else tokenizer
        if tokenizer.is_fast:
            # A copy, because these settings belong to the tokenizer.
            self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._fast.encode_special_tokens = not special.parse
            self._fast.no_truncation()
            self._fast.no_padding()
        self._words = WordCache.of(self._fast) if self._slow is None else None

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides the ids, including the rule for special tokens."""
        if self._slow is None:
            tokens = _sha256(self._fast.to_str())
        else:
            tokens = _sha256(json.dumps([type(self._slow).__name__, "split", sorted(self._slow.get_vocab().items())]))
        # Omits the default rule, so that fingerprints of older runs stay valid.
        return tokens if self.special == PLAIN_TEXT else _sha256(json.dumps([tokens, *self.special]))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; uses all cores if the tokenizer is a fast one.

        Raises:
            ConfigError: if a text has a lone surrogate.
        """
        if self._slow is None:
            try:
                return [found.ids for found in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
            except TypeError:
                for text in texts:
                    check_characters(text)
                raise
        split = not self.special.parse
        return [self._slow.encode(text, add_special_tokens=False, split_special_tokens=split) for text in texts]

    def ids(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Do the same as `encode` on one core; faster if words repeat (data/word_cache.py)."""
        if self._words is not None:
            return self._words.ids(texts)
        return [np.array(ids, dtype=np.uint32) for ids in self.encode(texts)]


def check_characters(text: str) -> None:
    """Refuse characters that no tokenizer accepts; raise ConfigError."""
    if found := lone_surrogate(text):
        raise ConfigError(f"the text {text[:40]!r} has a lone surrogate, {found!r}, which is not a valid character")


def pieces(document: str) -> Iterator[str]:
    """Yield the document in pieces of bounded length, cut after a line break if possible."""
    start = 0
    while len(document) - start > PIECE_CHARACTERS:
        cut = document.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        yield document[start:cut]
        start = cut
    yield document[start:]


def _counted(documents: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    for document in documents:
        yield document
        advance(len(document))


def _bounded(text: str) -> Iterator[str]:
    """Yield the text, with words cut that are too long to learn from."""
    start = 0
    for long in _LONG_WORD.finditer(text):
        yield text[start : long.end()]
        start = long.end()
    yield text[start:]


def _first(documents: Iterable[str], characters: int) -> Iterator[str]:
    for document in documents:
        for piece in pieces(document):
            if characters <= 0:
                return
            yield piece
            characters -= len(piece)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
