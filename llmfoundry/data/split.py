"""Decide which text is for training and which is held out for validation.

Names of files and folders decide if they tell the splits apart. If one body of text serves both splits and its names
say nothing, a hash decides: of a file's name, or of a row's text. A document therefore stays in its split when others
are added or removed. A single text is cut, and its end is held out.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from llmfoundry.config import ConfigError
from llmfoundry.data.files import COMPRESSIONS, FORMATS

# Smaller tables are scanned, so that neither split is left without a row.
FEW_BYTES = 2**22

Split = Literal["train", "validation"]

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation", "heldout", "holdout"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_ENDINGS = {ending.removeprefix(".") for ending in (*FORMATS, *COMPRESSIONS)}
_HELD_OUT = re.compile(r"(held|hold)[-_ ]out")
# Shard numbers, and the hashes that the hub adds: train-00000-of-00004-a09b74b3ef9c3b56.parquet.
_NUMBERING = re.compile(r"(part|shard|chunk|of)?\d*|[0-9a-f]{16}")


class _Label(NamedTuple):
    """What a name says: `train_en-00001.txt` in `data` belongs to the split train, at the place (data, (en,))."""

    split: str
    place: tuple[str, tuple[str, ...]]  # equal for names that differ only in split and number


class Selection(NamedTuple):
    """The files of one split."""

    kept: list[str]
    left: dict[str, list[str]]  # names of the other files, by split (validation, test, "" for none)

    def said(self, split: Split) -> str:
        """Return a note for the log, e.g. `, the train split by name; not read: 2 of validation (e.g. val/a.txt)`."""
        left = [f"{len(names)} of {what or 'no split'} (e.g. {names[0]})" for what, names in self.left.items()]
        return f", the {split} split by name; not read: {', '.join(left)}"


def select(sizes: Mapping[str, int], split: Split, *, given_for_validation: bool) -> Selection | None:
    """Choose the files of a split by the usual names of splits, or return None if the names do not tell them apart.

    They do in two cases. A name for training and one for validation or test differ in nothing else (`train/` beside
    `val/`, `en-train-00000.parquet` beside `en-validation-00000.parquet`): then files without a split's name are in
    neither. Or plain `val`, `dev`, `test`, ... are at the top level beside other files: then the others are for
    training.

    Args:
        sizes: bytes of each file by its name below the folder, with `/`.
        given_for_validation: whether the whole folder was given for validation. Then only files named for training are
            left out.

    Raises:
        ConfigError: if more than half of the text is in files without a split's name.
    """
    labels = {name: _label(name) for name in sizes}
    at: dict[tuple[str, tuple[str, ...]], set[str]] = defaultdict(set)
    for label in labels.values():
        if label is not None:
            at[label.place].add(label.split)
    parts: dict[str, list[str]] = defaultdict(list)
    if any("train" in splits and len(splits) > 1 for splits in at.values()):
        for name, label in labels.items():
            parts[label.split if label else ""].append(name)
        _check_most_has_a_split(sizes, parts)
    elif given_for_validation:
        return None
    else:
        for name, label in labels.items():
            held_out = label is not None and label.split != "train" and label.place == ("", ())
            parts[label.split if label is not None and held_out else "train"].append(name)
    if len(parts) < 2 or "train" not in parts:
        return None
    wanted = split if split in parts else "test"
    return Selection(parts[wanted], {part: names for part, names in parts.items() if part != wanted})


def _check_most_has_a_split(sizes: Mapping[str, int], parts: Mapping[str, Sequence[str]]) -> None:
    totals = {part: sum(sizes[name] for name in names) for part, names in parts.items()}
    without = totals.pop("", 0)
    if without > sum(totals.values()):
        held_out = next(part for part in totals if part != "train")
        raise ConfigError(
            f"dataset.path: {parts['train'][0]} and {parts[held_out][0]} look like splits, but more than half of the "
            f"text is in {len(parts[''])} files of no split, e.g. {parts[''][0]}; give train_loader and eval_loader "
            "paths of their own (a folder, a file or a glob such as texts/part-*.txt), or move the files apart"
        )


def _label(name: str) -> _Label | None:
    """Return the split named by the first folder on the path that names one, or by the file itself."""
    above: list[str] = []
    for part in name.casefold().split("/"):
        words = re.split(r"[-_. ]+", _HELD_OUT.sub("heldout", part))
        words = [word.rstrip("0123456789") if word.rstrip("0123456789") in _SPLIT_OF else word for word in words]
        found = [word for word in words if word in _SPLIT_OF]
        if len(found) == 1:
            known = {found[0], *_ENDINGS}
            rest = tuple(word for word in words if word not in known and not _NUMBERING.fullmatch(word))
            return _Label(_SPLIT_OF[found[0]], ("/".join(above), rest))
        above.append(part)
    return None


def share(key: str) -> float:
    """Return a number in [0, 1) that depends only on the key."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:7], "big") / 2**56


def keeps(key: str, split: Split, fraction: float) -> bool:
    """Return whether the document with this key belongs to `split`, if `fraction` of all documents are held out."""
    return (share(key) < fraction) == (split == "validation")


def filling_both(shares: Collection[float], fraction: float) -> float:
    """Return the fraction nearest to `fraction` that leaves neither split empty, for two or more documents' shares."""
    return min(max(fraction, math.nextafter(min(shares), 1.0)), max(shares))


def cut(text: str, split: Split, fraction: float) -> str:
    """Return the part of a text that belongs to `split`. Its last `fraction` is held out, cut at a start of a line."""
    point = min(max(round(len(text) * (1 - fraction)), 1), max(len(text) - 1, 0))
    line = text.rfind("\n", 0, point) + 1
    if line and point - line <= len(text) * fraction / 2:
        point = line
    return text[:point] if split == "train" else text[point:]
