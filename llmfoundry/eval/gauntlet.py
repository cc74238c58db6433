"""The gauntlet: many tasks summed up in a few scores, by LLM Foundry's rules.

A benchmark's score is its accuracy above the random baseline, rescaled so that 1 is perfect. A category's score is the
weighted mean of its benchmarks; an average is the mean of its categories.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from llmfoundry.config import Config
from llmfoundry.eval.icl import PREFIX, Score, Task

log = logging.getLogger(__name__)

COMPOSITE = "icl/metrics/eval_gauntlet/"


class Benchmark(Config):
    """A task with a number of few-shot examples."""

    name: str  # the task's label
    num_fewshot: int = Field(ge=0)  # one of the task's numbers of solved examples
    random_baseline: float = Field(ge=0, lt=1)  # accuracy of random guesses

    @property
    def task(self) -> str:
        """The name of the task; metrics of its categories start with it."""
        return f"{self.name}/{self.num_fewshot}-shot"


class Category(Config):
    """Benchmarks of one ability."""

    name: str  # name in the metrics
    benchmarks: list[Benchmark] = Field(min_length=1)  # tasks of icl_tasks, by label


class GauntletConfig(Config):
    """The YAML's `eval_gauntlet`."""

    # Weights of a category's benchmarks: equal, by the number of rows, or by its log2
    weighting: Literal["EQUAL", "SAMPLE_SZ", "LOG_SAMPLE_SZ"] = "EQUAL"
    subtract_random_baseline: bool = True  # subtract the accuracy of random guesses
    rescale_accuracy: bool = True  # divide by 1 - random_baseline
    categories: list[Category]  # each category gets a score
    # Lists of categories, by the average's name; None: default_average, over all categories
    averages: dict[str, list[str]] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rescale_accuracy and not self.subtract_random_baseline:
            raise ValueError("rescale_accuracy=true needs subtract_random_baseline=true; write both or neither")
        names = [category.name for category in self.categories]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"categories: two are called {twice!r}; rename one")
        if both := sorted(set(self.averages or {}) & set(names)):
            raise ValueError(f"averages.{both[0]}: is the name of a category too; rename one")
        return self

    def warn_of_missing(self, tasks: Sequence[Task]) -> None:
        """Warn of categories that count in no average: one of their tasks is not evaluated, or they do not exist."""
        for category in self.categories:
            missing = [each.task for each in category.benchmarks if not _of(each, {task.name for task in tasks})]
            if missing:
                log.warning(
                    "eval_gauntlet: %s has no score and counts in no average: icl_tasks has no %s",
                    category.name, ", ".join(missing),
                )  # fmt: skip
        names = {category.name for category in self.categories}
        for average, members in (self.averages or {}).items():
            if unknown := sorted(set(members) - names):
                log.warning("eval_gauntlet.averages.%s: there is no category %s", average, ", ".join(unknown))

    def composite(self, scores: Mapping[str, Score], tasks: Sequence[Task]) -> dict[str, float]:
        """Return the scores of categories and averages, by the names of their metrics."""
        found: dict[str, float] = {}
        for category in self.categories:
            results = [self._score(benchmark, scores) for benchmark in category.benchmarks]
            known = [result for result in results if result is not None]
            if len(known) == len(results):
                weights = [self._weight(benchmark, tasks) for benchmark in category.benchmarks]
                found[category.name] = sum(w * s for w, s in zip(weights, known, strict=True)) / sum(weights)
        averages = self.averages
        if averages is None:
            averages = {"default_average": [category.name for category in self.categories]}
        for name, members in averages.items():
            parts = [found[member] for member in members if member in found]
            if parts:
                found[name] = sum(parts) / len(parts)
        return {f"{COMPOSITE}{name}": value for name, value in found.items()}

    def _score(self, benchmark: Benchmark, scores: Mapping[str, Score]) -> float | None:
        """Return a benchmark's mean accuracy over its categories; None if the task was not evaluated."""
        accuracies = {key.removeprefix(PREFIX): score.value for key, score in scores.items() if "Accuracy" in key}
        values = [accuracies[key] for key in _of(benchmark, accuracies.keys())]
        if not values:
            return None
        value = sum(values) / len(values)
        if self.subtract_random_baseline:
            value -= benchmark.random_baseline
        return value / (1 - benchmark.random_baseline) if self.rescale_accuracy else value

    def _weight(self, benchmark: Benchmark, tasks: Sequence[Task]) -> float:
        n_rows = max(sum(task.n_rows for task in tasks if _of(benchmark, {task.name})), 1)
        if self.weighting == "EQUAL":
            return 1.0
        return float(n_rows) if self.weighting == "SAMPLE_SZ" else max(math.log2(n_rows), 1.0)


def _of(benchmark: Benchmark, names: Iterable[str]) -> list[str]:
    """Return the names of tasks or metrics that belong to a benchmark."""
    return [name for name in names if f"{name}/".startswith(f"{benchmark.task}/")]
