"""Check that all ranks of a run were started alike. Ranks that differ would train silently wrong, or hang.

One reduction of the largest and smallest value of each part of a hash shows whether something differs. Only then are
keys gathered, to name it. Values are not gathered, because some are secrets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping

from llmfoundry import runtime
from llmfoundry.config import Config, ConfigError, dump

# Where files are, which nodes may see under other names. What is in them is compared: `check_shared`, fingerprints.
_PLACES = ("cache_dir", "path", "local", "save_folder", "run_name")
_NAMED = 5  # keys in a message


def check_same_config(config: Config) -> None:
    """Check that all ranks have read the same settings; all ranks call this before anything depends on them.

    Raises:
        ConfigError: as `check_same`.
    """
    check_same({key: value for key, value in _leaves(dump(config)) if key.rpartition(".")[2] not in _PLACES})


def check_same(values: Mapping[str, object]) -> None:
    """Check that all ranks hold the same values; all ranks call this together.

    Args:
        values: values that JSON can represent, by the name to use in messages.

    Raises:
        ConfigError: on every rank; names the first rank that differs from rank 0, and the values' names.
    """
    if runtime.world_size() == 1:
        return
    digests = {key: _digest(value) for key, value in values.items()}
    own = [float(int(part, 16)) for part in re.findall(".{8}", _digest(digests))]
    found = runtime.most_of_ranks([*own, *(-each for each in own)])
    if all(most == -least for most, least in zip(found[: len(own)], found[len(own) :], strict=True)):
        return
    first, *others = runtime.of_each_rank(digests)
    for rank, other in enumerate(others, 1):
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        if keys:
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            raise ConfigError(
                f"rank {rank} differs from rank 0: {', '.join(keys[:_NAMED])}{more}; give all ranks the "
                "same YAML, overrides, data and tokenizer"
            )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in items:
        yield from _leaves(part, f"{path}.{key}" if path else str(key))
    if not items:
        yield path, tree
