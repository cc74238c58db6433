"""Inputs that are almost right: what hypothesis makes of a valid text, file or JSON value."""

from __future__ import annotations

import copy
import json

from hypothesis import strategies as st

# What readers stumble over, where it is put into a text.
WORDS = [
    "", "null", "-1", "1e400", "-1e400", "NaN", "Infinity", "1e-400", str(2**31), str(2**63), str(2**64), "9" * 5000,
    "[" * 200, "{" * 200, "[" * 20_000, '{"a":' * 20_000, "]", "}", '"', "'",
    "\\", "\0", "\ufeff", "\ud7ff", "&a", "*a",
    "!!python/object/apply:os.getcwd []", "${a}", "${oc.env:HOME}", "${oc.create:{}}", "???", "%", "../..",
    "/etc/passwd",
    "true", "0x10", "1_000", "1:30", "- ", ": ", "\n", "\t", "<<", "|", ">", "#", "é", "\N{PILE OF POO}", "a" * 70_000,
]  # fmt: skip
VALUES: list[object] = [
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**30, 0.5, -0.0, 1e300, "", "a", "../x", "\0", "1e400", [],
    {}, [0], [-1], [2**62, 2**62], [[]], {"a": {}}, [None], "F32", "I8", "x" * 5000, "\ud800", ["a", "b"],
]  # fmt: skip


@st.composite
def of_text(draw: st.DrawFn, valid: str) -> str:
    """A text with up to four pieces cut out, doubled, moved, or replaced by a word."""
    text = valid
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 1, 1, 2, 5, 20, 100])))
        what = draw(st.sampled_from(["word", "word", "cut", "double", "noise", "move"]))
        if what == "word":
            text = text[:start] + draw(st.sampled_from(WORDS)) + text[end:]
        elif what == "cut":
            text = text[:start] + text[end:]
        elif what == "double":
            text = text[:end] + text[start:]
        elif what == "noise":
            text = text[:start] + draw(st.text(max_size=8)) + text[end:]
        else:
            at = draw(st.integers(0, len(text)))
            text = text[:at] + text[start:end] + text[at:]
    return text


@st.composite
def of_bytes(draw: st.DrawFn, valid: bytes, head: int = 2**12) -> bytes:
    """A file with up to four places changed, most of them in its head, or cut short."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        most = max(0, (len(content) if draw(st.integers(0, 3)) == 0 else min(head, len(content))) - 1)
        at = draw(st.integers(0, most))
        what = draw(st.sampled_from(["bits", "bits", "number", "cut", "insert", "end"]))
        if what == "bits" and content:
            content[at] ^= draw(st.integers(1, 255))
        elif what == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            value = draw(st.sampled_from([0, 1, 255, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
            content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        elif what == "cut":
            del content[at : at + draw(st.integers(1, 64))]
        elif what == "insert":
            content[at:at] = draw(st.binary(max_size=16))
        else:
            del content[at:]
    return bytes(content)


@st.composite
def of_json(draw: st.DrawFn, valid: object) -> str:
    """The text of a JSON value in which up to three places have another value, or a key is gone or new."""
    root = {"": copy.deepcopy(valid)}
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(_places(root)))
        what = draw(st.sampled_from(["value", "value", "value", "gone", "other"]))
        if what == "value":
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "gone" and holder is not root:
            del holder[key]
        else:
            other, there = draw(st.sampled_from(_places(root)))
            holder[key] = copy.deepcopy(other[there])
    text = json.dumps(root[""])
    return draw(of_text(text)) if draw(st.integers(0, 3)) == 0 else text


def _places(value: object) -> list[tuple]:
    """Every (mapping or list, key) below a value; of long lists the first."""
    found: list[tuple] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(min(len(each), 12)) if isinstance(each, list) else []
        for key in keys:
            found.append((each, key))  # type: ignore[arg-type]
            waiting.append(each[key])  # type: ignore[index]
    return found[:2000]
