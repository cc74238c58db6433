"""What the source says about each field of a config: the comment beside it, or the comment lines above it."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from functools import cache

from llmfoundry.config import Config

_IN_YAML = {"None": "null", "True": "true", "False": "false"}
_FOR_TOOLS = re.compile(r"\s*#?\s*(type: ignore|noqa|fmt:)\S*.*$")


def comment_of(cls: type[Config], field: str) -> str:
    """The comment of a field, where the class or the nearest of its parents has one; empty if none has.

    The values that Python and YAML spell differently are YAML's.
    """
    found = next((found for parent in cls.__mro__ if (found := _comments(parent).get(field))), "")
    return re.sub(r"\b(None|True|False)\b", lambda word: _IN_YAML[word[0]], found)


def summary_of(cls: type[Config]) -> str:
    """The first paragraph of a class's docstring, on one line."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
    return " ".join(text.split())


@cache
def _comments(cls: type) -> dict[str, str]:
    """The comments of the fields that a class's own body declares."""
    if not issubclass(cls, Config) or cls is Config:
        return {}
    source = textwrap.dedent(inspect.getsource(cls))
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    beside, above = _lines(source)
    found = {}
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        said, line = [beside.get(node.end_lineno or node.lineno, "")], node.lineno - 1
        while line in above:
            said.insert(0, above[line])
            line -= 1
        found[node.target.id] = " ".join(part for part in said if part)
    return found


def _lines(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """The comments of a source by line: those that stand behind code, and those that have a line of their own."""
    beside, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = _FOR_TOOLS.sub("", token.string.removeprefix("#")).strip()
            (alone if token.line.lstrip().startswith("#") else beside)[token.start[0]] = text
    return beside, alone
