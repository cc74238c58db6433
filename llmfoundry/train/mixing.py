"""The position of a run in a mixture of datasets: the ends of its phases, and what was read before it was changed.

Besides the number of rows, a checkpoint records how many rows of each source were read. A run that resumes with another
mixture (`load_allow: [mixture]`) continues each source from there, and starts new sources at their first row.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from llmfoundry.checkpoint.reading import Contents, Json
from llmfoundry.config import ConfigError
from llmfoundry.data.mixture import Mixture, Phase
from llmfoundry.train.duration import Duration, Timeline


class Joined(NamedTuple):
    """Where a run switched to its present mixture."""

    row: int = 0
    before: dict[str, int] = {}  # rows of each source that it had read by then


class _Saved(NamedTuple):
    """What a checkpoint records of its mixture."""

    taken: dict[str, int]  # rows by label
    data: dict[str, str]  # fingerprints by label
    joined: Joined


def row_ends(phases: list[Phase], timeline: Timeline) -> list[int]:
    """Return the rows at which all phases but the last end.

    Raises:
        ConfigError: if a phase does not end after the one before it.
    """
    ends: list[int] = []
    for number, phase in enumerate(phases[:-1]):
        assert phase.until is not None
        try:
            end = timeline.steps(Duration.parse(phase.until)) * timeline.rows_per_step
        except ConfigError as error:
            raise ConfigError(f"train_loader.mixture.{number}.until: {error}") from None
        if end <= (ends[-1] if ends else 0):
            raise ConfigError(f"train_loader.mixture.{number}.until: {phase.until} is not after the phase before it")
        ends.append(end)
    return ends


def take_up(mixture: Mixture, ends: list[int], contents: Contents | None, rows: int, allowed: bool) -> Joined:
    """Arrange a mixture for a run, from its first row or from a checkpoint.

    Args:
        ends: as `row_ends` returns them.
        contents: the checkpoint that the run continues.
        rows: rows that the run has read.
        allowed: whether the run may switch to another mixture here.

    Returns:
        What the checkpoints of this run have to record.

    Raises:
        ConfigError: if the phases end at other rows than before, so other rows would have been read.
    """
    if contents is None:
        mixture.arrange(ends)
        return Joined()
    saved = _saved(contents, rows)
    if contents.trainer.get("data") == mixture.fingerprint:
        mixture.arrange(ends, saved.joined.row, [saved.joined.before.get(label, 0) for label in mixture.labels])
        if mixture.taken(rows) == saved.taken:
            return saved.joined
        if not allowed:
            raise ConfigError(
                f"{contents.path}: read other rows, because train_loader.mixture ends its phases at other times now; "
                "restore max_duration and until, or continue with the new times from here: load_allow=[mixture]"
            )
    before = {label: saved.taken.get(label, 0) for label in mixture.labels if saved.data.get(label)}
    for label, fingerprint in mixture.data.items():
        if saved.data.get(label) != fingerprint:
            same = (saved.taken[other] for other, data in saved.data.items() if data == fingerprint)
            before[label] = next(same, 0)
    mixture.arrange(ends, rows, [before[label] for label in mixture.labels])
    return Joined(rows, before)


def _saved(contents: Contents, rows: int) -> _Saved:
    found = contents.trainer.get("mixture")
    if not isinstance(found, dict):  # of a run on a single dataset
        return _Saved({"": rows}, {"": str(contents.trainer.get("data"))}, Joined())
    joined = cast(dict[str, Json], found["joined"])
    return _Saved(
        cast(dict[str, int], found["taken"]), cast(dict[str, str], found["data"]),
        Joined(cast(int, joined["row"]), cast(dict[str, int], joined["before"])),
    )  # fmt: skip


def to_save(mixture: Mixture, rows: int, joined: Joined) -> Json:
    """Return what a checkpoint records of a mixture after `rows` rows."""
    return {"taken": cast(Json, mixture.taken(rows)), "data": cast(Json, mixture.data),
            "joined": {"row": joined.row, "before": cast(Json, joined.before)}}  # fmt: skip
