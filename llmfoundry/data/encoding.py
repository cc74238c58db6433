"""Tokenize documents in batches, in this process or in several, with the same ids in the same order."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmfoundry.config import ResourceError
from llmfoundry.data.sieve import Counts
from llmfoundry.data.tokenizer import Encoder, pieces

# Characters passed to a tokenizer at a time: enough to keep all cores busy, and few enough to bound memory.
BATCH_CHARACTERS = 2**22
WORKER_CHARACTERS = 2**20  # the same for one of several processes
_AHEAD = 3  # batches in flight per worker


class Text(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    counts: Counts | None  # after the document that ends here; None: it continues


def encoded(
    documents: Iterable[tuple[str, Counts]], encoder: Encoder, dtype: np.dtype, workers: int = 0
) -> Iterator[tuple[Text, NDArray]]:
    """Yield each text with its token ids.

    Args:
        documents: documents, each with the counts after it.
        dtype: dtype of the ids.
        workers: number of processes that tokenize, one core each; 1: this process only; 0: this process, with the
            tokenizer's own threads.

    Raises:
        ResourceError: if a worker was killed.
    """
    if workers <= 1:
        encode = encoder.ids if workers else encoder.encode
        for batch in _batches(documents, BATCH_CHARACTERS):
            found = encode([each.text for each in batch])
            yield from zip(batch, (np.asarray(ids, dtype) for ids in found), strict=True)
        return
    # Forked, so that workers inherit the tokenizer without importing anything; they start no threads.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start, (encoder, dtype, os.getpid()))
    waiting: deque[tuple[list[Text], Future[tuple[NDArray, list[int]]]]] = deque()
    try:
        for batch in _batches(documents, WORKER_CHARACTERS):
            waiting.append((batch, pool.submit(_encode, [each.text for each in batch])))
            if len(waiting) >= _AHEAD * workers:
                yield from _received(*waiting.popleft())
        while waiting:
            yield from _received(*waiting.popleft())
    except BrokenProcessPool:
        raise ResourceError(
            "a worker was killed, most likely because memory ran out; use fewer --workers (finished parts are kept)"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _received(batch: list[Text], future: Future[tuple[NDArray, list[int]]]) -> Iterator[tuple[Text, NDArray]]:
    ids, lengths = future.result()
    start = 0
    for text, length in zip(batch, lengths, strict=True):
        yield text, ids[start : start + length]
        start += length


_encoder: Encoder | None = None  # in a worker
_dtype: np.dtype


def _start(encoder: Encoder, dtype: np.dtype, parent: int) -> None:
    global _encoder, _dtype
    _encoder, _dtype = encoder, dtype
    gc.freeze()  # keeps the garbage collector from touching, and so copying, the forked pages
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end when the parent does, however it ends
    if os.getppid() != parent:
        os._exit(1)


def _encode(texts: list[str]) -> tuple[NDArray, list[int]]:
    assert _encoder is not None
    found = _encoder.ids(texts)
    return np.concatenate(found).astype(_dtype), [len(ids) for ids in found]


def _batches(documents: Iterable[tuple[str, Counts]], size: int) -> Iterator[list[Text]]:
    """Group texts into batches of bounded size."""
    batch: list[Text] = []
    characters = 0
    for document, counts in documents:
        parts = list(pieces(document))
        for number, part in enumerate(parts, 1):
            batch.append(Text(part, counts if number == len(parts) else None))
            characters += len(part)
            if characters >= size:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch
