"""Read YAML from untrusted authors as plain data, and write it so that it reads back unchanged.

The dialect is YAML 1.1 as in PyYAML, except that `1e-5` is a number and YAML 1.1's octal and base-60 numbers are
refused. Tags do not build objects, keys must be unique, and depth and size are bounded before anything is expanded.
"""

from __future__ import annotations

import re
from collections import Counter

import yaml

MAX_DEPTH = 40
MAX_SIZE = 100_000  # values and characters after aliases and interpolations are expanded, in units of 1 and 64
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def load(text: str, where: str) -> object:
    """Parse YAML text into plain data; keys are strings.

    Raises:
        ValueError: if the text is malformed; each line of the message starts with `where` and the line number.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, {})
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and "\n" in text else ""
        why = " ".join(str(part) for part in (error.context, error.problem) if part)
        if "'\\t'" in why:
            why = "starts with a tab, and YAML allows only spaces; write two spaces for each tab"
        raise ValueError(f"{where}{line}: {' '.join(why.split())}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    if loader.mistakes:
        raise ValueError("\n".join(f"{where}: {mistake}" for mistake in loader.mistakes))
    return data


def dump(data: object) -> str:
    """Write plain data as text that `load` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120)


class _Dialect(yaml.resolver.BaseResolver):
    """The rule for which plain scalars are numbers, shared by the loader and the dumper."""


for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        if not _tag.endswith((":timestamp", ":float", ":value")):
            _Dialect.add_implicit_resolver(_tag, _pattern, [_first])
_Dialect.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+"
        r"|[-+]?\d[\d_]*(:[0-5]?\d)+\.[\d_]*|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
    ),
    list("-+.0123456789"),
)


class _Loader(_Dialect, yaml.SafeLoader):
    """Loads plain data: no tags build objects, keys are unique, and nesting and repetition are bounded."""

    yaml_implicit_resolvers = _Dialect.yaml_implicit_resolvers

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.mistakes: list[str] = []  # numbers in an unexpected notation

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _malformed("is nested too deeply", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value.replace("_", "").lower()
        is_float = node.tag.endswith(":float")
        if ":" in text or (not is_float and re.fullmatch(r"[-+]?0\d+", text)):
            kind = "a base-60" if ":" in text else "an octal"
            line = node.start_mark.line + 1
            self.mistakes.append(
                f"line {line}: {node.value} is {kind} number in YAML 1.1; write it in decimal, or quote it"
            )
            return 0
        return float(self.construct_yaml_float(node)) if is_float else int(self.construct_yaml_int(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, object]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def refuse(self, node: yaml.Node) -> object:
        raise _malformed(f"the tag {node.tag} is not allowed", node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
for _tag in ("binary", "omap", "pairs", "set", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.refuse)
_Loader.add_constructor(None, _Loader.refuse)


class _Dumper(_Dialect, yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number, and writes no aliases."""

    yaml_implicit_resolvers = _Dialect.yaml_implicit_resolvers

    def ignore_aliases(self, data: object) -> bool:
        return True


def _check(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Return the number of values that a node expands to.

    Raises:
        yaml.YAMLError: there are too many, a node contains itself, a key is repeated or is not a plain word, or a text
        has a NUL or half a surrogate pair.
    """
    if id(node) in sizes:
        known = sizes[id(node)]
        if known is None:
            raise _malformed("an alias refers to what it is a part of", node)
        return known
    sizes[id(node)] = None
    children: list[yaml.Node] = []
    texts: list[str] = []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(keys) < len(node.value):
            raise _malformed("a key must be a plain word", node)
        if len(set(keys)) < len(keys):
            twice = min(key for key, count in Counter(keys).items() if count > 1)
            raise _malformed(f"the key {twice!r} comes twice", node)
        children = [value for _, value in node.value]
        texts = keys
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    else:
        texts = [node.value]
    if any(_UNWRITABLE.search(text) for text in texts):
        raise _malformed("a text holds a NUL or half a character, which no name of a file may hold", node)
    total = 1 + sum(_check(child, sizes) for child in children)
    if total > MAX_SIZE:
        raise _malformed("its aliases expand to too many values", node)
    sizes[id(node)] = total
    return total


def _malformed(why: str, at: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=why, problem_mark=at.start_mark)
