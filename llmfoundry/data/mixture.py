"""The `mixture` dataset (`datasets: [...]`): several datasets in fixed shares of rows, which may change during a run.

Row n of a run is row k of one source, and both are functions of n alone (data/interleave.py). Row k of a source is the
row that it would be if that source were the whole run. All rows have max_seq_len tokens, so shares of rows are shares
of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import Config, ConfigError, lifted
from llmfoundry.data.interleave import Interleave, exact, shares_of
from llmfoundry.data.rows import (
    STRETCH,
    Block,
    How,
    Order,
    Places,
    RowsConfig,
    StreamReader,
    StreamRows,
    Stretch,
    open_order,
)
from llmfoundry.data.sources import DatasetConfig, Source, fingerprint_of

LOSSES = ("ce", "total")  # loss/train/NAME over all sources, in addition to loss/train/LABEL of each


class Part(Config):
    """A source of a mixture: its dataset's keys, and keys for how much of it is read."""

    dataset: DatasetConfig  # the dataset; its keys may also stand directly in this block
    label: str | None = None  # name in metrics and phases; None: from the folder or file
    weight: float | None = Field(default=None, gt=0)  # share of tokens, relative to the other weights
    tokens: float | None = Field(default=None, gt=0)  # alternatively: number of its tokens that the run reads
    epochs: float | None = Field(default=None, gt=0)  # alternatively: number of times that the run reads it
    max_epochs: float | None = Field(default=None, gt=0)  # refuse a run that would read it more often

    @model_validator(mode="wrap")
    @classmethod
    def _written_out(cls, data: object, check: ModelWrapValidatorHandler[Self]) -> Self:
        """Accept the dataset's keys directly beside those of the part."""
        if not isinstance(data, dict) or "dataset" in data:
            return check(data)
        own = {key: value for key, value in data.items() if key in cls.model_fields}
        try:
            return check(own | {"dataset": {key: value for key, value in data.items() if key not in own}})
        except ValidationError as error:
            raise lifted(error, "dataset", cls) from None

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        given = [key for key in ("weight", "tokens", "epochs") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how much of it is read; keep one")
        if isinstance(self.dataset, MixtureConfig):
            raise ValueError("is a mixture itself; list its datasets here")
        return self

    @property
    def name(self) -> str:
        """The label, or else a name made from the dataset."""
        if self.label is not None:
            return self.label
        where = next((found for key in ("path", "local", "hf_name") if (found := getattr(self.dataset, key, None))), "")
        return Path(where).name.partition(".")[0] or self.dataset.name


class Phase(Config):
    """Weights for a part of the run."""

    until: str | None = None  # end of the phase in run time, e.g. 0.8dur or 5e9tok; the last phase has none
    weights: dict[str, float]  # weights by label; sources that are not named are not read


class MixtureConfig(RowsConfig, names=("mixture",)):
    """Several interleaved datasets. `train_loader.datasets: [...]` is short for it."""

    datasets: list[Part] = Field(min_length=1)  # the sources
    mixture: list[Phase] = []  # phases in order of time; empty: the datasets' weights hold for the whole run
    # Weights become weight ** (1 / temperature); above 1 makes them more even
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        labels = self.labels
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"datasets: two are called {twice!r}; give each a label")
        bad = next((label for label in labels if not label or "/" in label), None)
        if bad is not None:
            raise ValueError(f"datasets: {bad!r} cannot be a label; it needs a name without /")
        taken = next((label for label in labels if label in LOSSES), None)
        if taken is not None:
            raise ValueError(
                f"datasets: {taken!r} cannot be a label: loss/train/{taken} is the loss of all datasets together; "
                "give it another label"
            )
        weighted = [part.name for part in self.datasets if part.weight is not None]
        measured = [part.name for part in self.datasets if part.tokens is not None or part.epochs is not None]
        for some, key in ((weighted, "weight"), (measured, "tokens or epochs")):
            missing = next((label for label in labels if label not in some), None)
            if some and missing is not None and not self.mixture:
                raise ValueError(f"datasets: {some[0]} has {key} and {missing} does not; give it to all, or to none")
        self._check_phases()
        return self

    def _check_phases(self) -> None:
        for number, phase in enumerate(self.mixture):
            unknown = next((label for label in phase.weights if label not in self.labels), None)
            if unknown is not None:
                raise ValueError(
                    f"mixture.{number}.weights: {unknown!r} is not a dataset; known: {', '.join(self.labels)}"
                )
            if not any(phase.weights.values()) or min(phase.weights.values()) < 0:
                raise ValueError(f"mixture.{number}.weights: must be positive, or 0 for datasets that are not read")
            if (phase.until is None) != (number == len(self.mixture) - 1):
                raise ValueError(f"mixture.{number}.until: is missing; only the last phase has none")

    @property
    def labels(self) -> list[str]:
        """The names of the sources."""
        return [part.name for part in self.datasets]

    def parts(self) -> list[DatasetConfig]:
        return [part.dataset for part in self.datasets]

    def with_parts(self, parts: Sequence[DatasetConfig]) -> Self:
        both = zip(self.datasets, parts, strict=True)
        return self.model_copy(update={"datasets": [part.model_copy(update={"dataset": each}) for part, each in both]})

    def build(self) -> Source:
        """Return the texts of all sources in the ratio of their weights: the text that a tokenizer is trained on."""
        sources = [part.dataset.build() for part in self.datasets]
        weights = [part.weight or 1.0 for part in self.datasets]
        return Source(
            self.name,
            fingerprint_of("mixture/1", *(source.fingerprint for source in sources), *weights),
            lambda: _in_ratio([source.documents() for source in sources], weights),
            sum(source.n_bytes or 0 for source in sources) or None,
            files=frozenset().union(*(source.files for source in sources)),
        )

    def order(self, tokenizer: PreTrainedTokenizerBase, how: How) -> Mixture:
        orders = []
        for part in self.datasets:
            orders.append(open_order(part.dataset, tokenizer, how))
            if orders[-1].length != how.length:
                raise ConfigError(
                    f"datasets: {part.name}: max_seq_len={orders[-1].length}, and other sources have {how.length}; "
                    "all rows of a mixture have one length"
                )
            if orders[-1].once is None:
                raise ConfigError(
                    f"datasets: {part.name}: has streams in counts of rows; list each of its folders as a dataset "
                    "with a weight"
                )
        return Mixture(self, orders)

    def shares(self, orders: Sequence[Order]) -> list[list[int]]:
        """Return the integer shares of all sources in each phase; 0 for sources that are not read."""
        if not self.mixture:
            return [self._integers([self._weight(*both) for both in zip(self.datasets, orders, strict=True)])]
        return [
            self._integers([exact(phase.weights.get(label, 0.0)) for label in self.labels]) for phase in self.mixture
        ]

    def _weight(self, part: Part, order: Order) -> Fraction:
        if part.weight is not None:
            return exact(part.weight)
        budget = _budget(part, order)
        return Fraction(order.rows_per_epoch) if budget is None else budget

    def _integers(self, weights: Sequence[Fraction]) -> list[int]:
        if self.temperature != 1.0:
            weights = [self._evened(weight) if weight else weight for weight in weights]
        positive = iter(shares_of([weight for weight in weights if weight]))
        return [next(positive) if weight else 0 for weight in weights]

    def _evened(self, weight: Fraction) -> Fraction:
        """Return `weight ** (1 / temperature)`, correctly rounded, because powers of floats differ between machines."""
        power = float(Context(prec=50, traps=[]).power(Decimal(float(weight)), Decimal(1 / self.temperature)))
        if not 0 < power < math.inf:
            raise ConfigError(f"temperature={self.temperature:g} makes of weights 0 or infinity; raise it")
        return exact(power)


def _budget(part: Part, order: Order) -> Fraction | None:
    """Return the number of rows that a run may read of a source; None: unlimited."""
    if part.tokens is not None:
        return exact(part.tokens) / order.length
    return None if part.epochs is None else exact(part.epochs) * order.rows_per_epoch


def _in_ratio(texts: list[Iterator[str]], weights: Sequence[float]) -> Iterator[str]:
    """Interleave documents so that characters are in the ratio of the weights until the first source ends."""
    read = dict.fromkeys(range(len(texts)), 0.0)
    while read:
        least = min(read, key=lambda i: read[i] / weights[i])
        text = next(texts[least], None)
        if text is None:
            del read[least]
        else:
            read[least] += len(text)
            yield text


class Segment(NamedTuple):
    """A part of the run with constant shares."""

    start: int  # its first row
    sources: NDArray[np.int64]  # (n read,) indices of the sources that are read
    interleave: Interleave
    before: NDArray[np.int64]  # (n_sources,) rows of each source before the start

    def at(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each row of the run, its source and its number within that source."""
        found, k = self.interleave.at(numbers - self.start)
        sources = self.sources[found]
        return sources, k + self.before[sources]


class Mixture(Order):
    """The order of the rows of a mixture."""

    def __init__(self, config: MixtureConfig, orders: Sequence[Order]) -> None:
        self.labels = tuple(config.labels)
        self.length, self.documents = orders[0].length, orders[0].documents
        self.own_positions = any(order.own_positions for order in orders)
        self._config, self._orders = config, list(orders)
        self._shares = config.shares(orders)
        phases = [str((phase.until, shares)) for phase, shares in zip(config.mixture, self._shares, strict=False)]
        self.data = {label: order.fingerprint for label, order in zip(self.labels, orders, strict=True)}
        shuffles = [(each.shuffle, each.shuffle_seed, each.shuffle_block_size) for each in config.parts()]
        orders_of = [str(each if each[2] is not None else each[:2]) for each in shuffles]
        shares = phases or [str(self._shares[0])]
        self.fingerprint = fingerprint_of("mixture/1", *self.data.items(), *orders_of, *shares)
        budgets = [_budget(part, order) for part, order in zip(config.datasets, orders, strict=True)]
        whole = [order.rows_per_epoch if budget is None else budget
                 for order, budget in zip(orders, budgets, strict=True)]  # fmt: skip
        self.rows_per_epoch = int(sum(whole))  # total of the sources, or of their budgets
        rows = [order.once for order in orders]
        self._rows = [each for each in rows if each is not None]
        assert len(self._rows) == len(orders)  # none is a mixture itself
        streams = [each.stream for each in self._rows if isinstance(each, StreamRows)]
        self._reader = StreamReader(streams, self.length, self.documents) if streams else None
        is_stream = np.array([isinstance(each, StreamRows) for each in self._rows])
        self._stream_of = np.where(is_stream, np.cumsum(is_stream) - 1, -1)  # (n_sources,) index in the reader, or -1
        self._segments: list[Segment] = []
        self.arrange([])

    @property
    def phases(self) -> list[Phase]:
        """The phases that the YAML names."""
        return self._config.mixture

    def arrange(self, ends: Sequence[int], start: int = 0, before: Sequence[int] | None = None) -> None:
        """Set where the phases end.

        Args:
            ends: the rows at which all phases but the last end, in order.
            start: the first row that is read from this mixture, if a run switched to it later.
            before: rows of each source that were read before `start`.
        """
        taken = np.array(before if before is not None else [0] * len(self.labels), dtype=np.int64)
        self._places, self._plan = Places(self._orders), Places([self])
        self._segments = []
        for number, shares in enumerate(self._shares):
            end = ends[number] if number < len(ends) else None
            if end is not None and end <= start:
                continue
            read = np.flatnonzero(shares)
            interleave = Interleave([shares[i] for i in read])
            self._segments.append(Segment(start, read, interleave, taken))
            if end is None:
                break
            taken = taken.copy()
            taken[read] += interleave.counts(end - start)
            start = end

    def check(self, rows: int) -> None:
        """Refuse a run that would read a source more often than allowed.

        Args:
            rows: number of rows of the whole run.

        Raises:
            ConfigError: if a source would be read more often; the message names it and says how often.
        """
        for part, order, n in zip(self._config.datasets, self._orders, self.counts(rows).tolist(), strict=True):
            epochs, budget = n / order.rows_per_epoch, _budget(part, order)
            if part.max_epochs is not None and epochs > part.max_epochs:
                raise ConfigError(
                    f"datasets: {part.name}: the run reads it {epochs:.3g} times (max_epochs={part.max_epochs:g}); "
                    "lower its weight, shorten max_duration, add text, or raise max_epochs"
                )
            if budget is not None and n >= budget + 1:
                raise ConfigError(
                    f"datasets: {part.name}: the run would read {n * order.length:,} tokens of it, and its budget is "
                    f"{int(budget * order.length):,}; shorten max_duration, or raise the budgets"
                )

    @property
    def is_bounded(self) -> bool:
        """Whether the number of epochs of some source is limited."""
        parts = zip(self._config.datasets, self._orders, strict=True)
        return any(part.max_epochs is not None or _budget(part, order) is not None for part, order in parts)

    @property
    def period(self) -> int:
        """The number of rows after which the sequence of sources repeats, in the last phase."""
        return self._segments[-1].interleave.period

    def counts(self, n: int) -> NDArray[np.int64]:
        """Return the number of rows of each source among the first n rows of the run: (n_sources,)."""
        at = max(i for i, segment in enumerate(self._segments) if segment.start <= n or i == 0)
        segment = self._segments[at]
        counts = segment.before.copy()
        counts[segment.sources] += segment.interleave.counts(max(n - segment.start, 0))
        return counts

    def taken(self, n: int) -> dict[str, int]:
        """Return the same as `counts`, by label."""
        return dict(zip(self.labels, self.counts(n).tolist(), strict=True))

    def describe(self) -> Mapping[str, str]:
        """Return the share of each source in each phase, for the log."""
        return {
            label: " -> ".join(f"{shares[i] / sum(shares):.4%}" for shares in self._shares)
            for i, label in enumerate(self.labels)
        }

    def sources(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the source of each row, as an index into the labels, in the shape of `numbers`."""
        return self._where(numbers)[0]

    def stretch(self, number: int) -> Stretch:
        """Return the stretch that a row is in; places are numbered as `place * n_sources + source`."""
        first = number - number % STRETCH
        sources, numbers = self._where(np.arange(first, first + STRETCH))
        return Stretch(first, self._places.of(sources, numbers) * len(self.labels) + sources)

    def read(self, numbers: NDArray[np.int64]) -> Block:
        places, sources = np.divmod(self._plan.of(np.zeros_like(numbers), numbers), len(self.labels))
        streams = self._stream_of[sources]
        if self._reader is not None and not self.own_positions and (streams >= 0).all():
            return self._reader.read(streams, places)._replace(sources=sources)
        out = self.empty(len(numbers))._replace(sources=sources)
        if self._reader is not None:
            mine = np.flatnonzero(streams >= 0)
            block = self._reader.read(streams[mine], places[mine])
            out.tokens[mine], out.labels[mine] = block.tokens, block.labels
            if out.documents is not None and block.documents is not None:
                out.documents[mine] = block.documents
        for i in np.flatnonzero(streams < 0).tolist():
            self._rows[sources[i]].put(int(places[i]), out, i)
        return out

    def _where(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        starts = [segment.start for segment in self._segments]
        if len(starts) == 1 or not len(numbers) or numbers.min() >= starts[-1]:  # the usual case: no phase ends here
            return self._segments[-1].at(numbers)
        sources, places = np.empty_like(numbers), np.empty_like(numbers)
        of = np.maximum(np.searchsorted(starts, numbers, side="right") - 1, 0)
        for i in np.unique(of).tolist():
            here = of == i
            sources[here], places[here] = self._segments[i].at(numbers[here])
        return sources, places
