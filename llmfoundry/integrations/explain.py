"""What each key of a YAML file was translated to: `llmfoundry explain YAML`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmfoundry.data.mds_rows import TUNING
from llmfoundry.integrations.foundry_tree import Note

_SAME = "unchanged"
_TUNING = "left out, shards are fetched as their rows are read"


def explained(given: dict[str, object], notes: Sequence[str]) -> Iterator[str]:
    """Yield a line for each value in a file, and one for each addition.

    Args:
        given: the file with its overrides, as written.
        notes: of its translation; one that is not a `Note` begins with the dotted path that it is about.
    """
    by_path: dict[str, list[str]] = {}
    for note in notes:
        name, said = (note.path, note.said) if isinstance(note, Note) else note.split(": ", 1)
        by_path.setdefault(name, []).append(said)
    values = dict(_leaves(given))
    width = min(60, max((len(_shown(*item)) for item in values.items()), default=0))
    told: set[str] = set()
    for path, value in values.items():
        about = next((name for name in _above(path) if name in by_path), None)
        same = _TUNING if ".dataset." in path and path.rpartition(".")[2] in TUNING else _SAME
        said = same if about is None else "; ".join(by_path[about])
        if about is not None and about in told and about != path:
            said = f"see {about}"
        told.add(about or "")
        yield f"{_shown(path, value):<{width}}  {said}"
    for name, said_of in by_path.items():
        if name not in told:
            yield f"{name:<{width}}  {'; '.join(said_of)}"


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield leaves, including empty blocks: an empty callback block means all defaults."""
    if isinstance(value, dict | list) and value:
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inside, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _shown(path: str, value: object) -> str:
    return f"{path}: {value}"


def _above(path: str) -> Iterator[str]:
    """Yield a path and all paths that contain it, the longest first."""
    while path:
        yield path
        path = path.rpartition(".")[0]
