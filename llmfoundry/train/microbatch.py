"""How many rows of a rank go through the model at once. With `auto`, fewer each time that memory runs out.

Fewer rows at once are more microbatches of the same step, and its gradient does not depend on them (step.py).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Literal

import torch

from llmfoundry import runtime
from llmfoundry.config import ConfigError, ResourceError
from llmfoundry.train.out_of_memory import Held
from llmfoundry.train.step import StepResult

log = logging.getLogger(__name__)

# The number of first steps in which ranks abort together if one runs out of memory. The optimizer's state exists from
# the second step on, so later steps need no more memory, except for the experts' changing loads.
WATCHED_STEPS = 3


class Microbatches:
    """The microbatch size in use.

    Args:
        asked: the value in the YAML.
        rows: rows of the global batch.
        ranks: ranks that they are divided over.

    Attributes:
        can_retry: whether the model can continue after a step that was left halfway.

    Raises:
        ConfigError: if ranks would have different numbers of microbatches, because they must meet in each.
    """

    def __init__(self, asked: int | Literal["auto"], rows: int, ranks: int) -> None:
        if rows < ranks:
            raise ConfigError(
                f"global_train_batch_size={rows} leaves some of {ranks} ranks without a row; write {ranks} or more"
            )
        self._least, self._most = rows // ranks, -(-rows // ranks)
        if asked != "auto" and not _meet(asked, self._least, self._most):
            raise ConfigError(
                f"global_train_batch_size={rows} over {ranks} ranks is {self._least} or {self._most} rows each, which "
                f"device_train_microbatch_size={asked} cuts into different numbers of microbatches; make it a multiple "
                f"of {ranks}, or the microbatch larger"
            )
        self.rows = self._most if asked == "auto" else asked
        self._auto = asked == "auto"
        self._watched = WATCHED_STEPS  # remaining steps in which ranks abort together
        self.can_retry = True

    def run(
        self, attempt: Callable[[int, bool], StepResult], explain: Callable[[int, Held | None, str], str]
    ) -> StepResult:
        """Take a step, with fewer rows at once if they do not fit.

        Args:
            attempt: `train_step`, given the microbatch size and whether ranks leave it together.
            explain: builds the error message if nothing can be retried, given the rows, the memory held when the ranks
                left (if it was measured), and the error.

        Raises:
            ResourceError: if not even the smallest microbatch fits, or memory ran out and nothing can be retried.
        """
        while True:
            together = self._auto and self.can_retry and (self._watched > 0 or runtime.world_size() == 1)
            try:
                result = attempt(self.rows, together)
            except runtime.OutOfMemory as error:
                why, there = str(error), error.held
            except torch.OutOfMemoryError as error:
                raise ResourceError(explain(self.rows, None, str(error))) from None
            else:
                self._watched -= 1
                return result
            if not self._take_fewer():
                assert isinstance(there, Held)
                raise ResourceError(explain(self.rows, there, why))

    def _take_fewer(self) -> bool:
        """Take fewer rows at once from now on; False if that cannot be."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = smaller(self.rows, self._least, self._most)
        if rows in (0, self.rows):
            return False
        if runtime.is_rank0():
            log.warning("out of memory with %d rows at once: continuing with %d (device_train_microbatch_size: auto)",
                        self.rows, rows)  # fmt: skip
        self.rows, self._watched = rows, WATCHED_STEPS
        return True


def smaller(rows: int, least: int, most: int) -> int:
    """The next smaller microbatch to try: the largest of which all are equal, or else half. 0: no such size.

    With 12 rows: 6, 4, 3, 2, 1. A last one that is smaller than the others would need a graph of its own.
    """
    n = -(-most // rows)
    even = (count for count in range(n + 1, 2 * n) if least == most and most % count == 0)
    return fitting(-(-most // next(even, 2 * n)), least, most)


def fitting(rows: int, least: int, most: int) -> int:
    """Return the largest microbatch size up to `rows` for which every rank has equally many microbatches; 0: none."""
    return next((n for n in range(rows, 0, -1) if _meet(n, least, most)), 0)


def _meet(rows: int, least: int, most: int) -> bool:
    """Return whether ranks with `least` and with `most` rows have equally many microbatches of `rows`."""
    return -(-least // rows) == -(-most // rows)
