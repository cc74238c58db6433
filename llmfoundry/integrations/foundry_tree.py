"""Access to a YAML file's plain data by dotted paths; a number in a path is a list index."""

from __future__ import annotations

from llmfoundry.model.foundry_words import Tree


class Note(str):
    """A line that says what became of a key.

    Args:
        path: of the key.
        said: what became of it.
        value: its value; non-empty mappings and lists are not shown.
    """

    path: str
    said: str

    def __new__(cls, path: str, said: str, *value: object) -> Note:
        shown = "".join(f"={each!r}" for each in value if not isinstance(each, dict | list) or not each)
        note = super().__new__(cls, f"{path}{shown}: {said}")
        note.path, note.said = path, said
        return note


def copied(data: Tree) -> Tree:
    """Return a deep copy in which YAML aliases are no longer shared, so that each block can be changed separately."""

    def each(value: object) -> object:
        if isinstance(value, dict):
            return {key: each(inside) for key, inside in value.items()}
        return [each(inside) for inside in value] if isinstance(value, list) else value

    return {key: each(value) for key, value in data.items()}


def look(data: Tree, path: str) -> tuple[object, bool]:
    """Return the value at a dotted path, and whether there is one."""
    node: object = data
    for part in path.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return None, False
    return node, True


def take(data: Tree, path: str) -> object:
    """Remove the value at an existing path, and return it."""
    parent, _, key = path.rpartition(".")
    node = look(data, parent)[0] if parent else data
    assert isinstance(node, dict)
    return node.pop(key)


def put(data: Tree, path: str, value: object) -> str:
    """Set a value; returns a line of text that says so."""
    *parents, key = path.split(".")
    node = data
    for part in parents:
        child = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        assert isinstance(child, dict | list)
        node = child  # type: ignore[assignment]
    node[key] = value
    return f"{path}: {value}"


def present(data: Tree, path: str) -> list[str]:
    """Return the path if it exists; if it leads through a list, the paths into each item."""
    head, *rest = path.split(".")
    block = data.get(head)
    if isinstance(block, list) and rest:
        each = (f"{head}.{number}.{'.'.join(rest)}" for number in range(len(block)))
        return [one for one in each if look(data, one)[1]]
    return [path] if look(data, path)[1] else []
