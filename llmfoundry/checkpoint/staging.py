"""Host-memory copies for asynchronous saves, made while the next step runs.

Between a save and the next `optimizer.step()`, forward and backward read parameters and the optimizer's state, but do
not change them. So they are copied meanwhile, and only the update waits: on a CPU for the writer thread, on a GPU the
device waits for a separate stream. What a forward may change (buffers) is copied immediately.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.checkpoint.storage import Part


class Stage:
    """The copies of one save at a time, in memory that is reused."""

    def __init__(self) -> None:
        self.waited = 0.0  # seconds that updates waited for copies; the reader resets it to 0
        self._memory: dict[str, torch.Tensor] = {}
        self._left: list[Part] = []  # to be copied by `finish`
        self._copied = threading.Event()  # set when the tensors in host memory are copied
        self._copied.set()
        self._stream: torch.cuda.Stream | None = None
        self._on_device: torch.cuda.Event | None = None  # recorded when the tensors on the GPU are copied
        self._hooked: WeakSet[Optimizer] = WeakSet()

    def make_room(self, parts: Sequence[Part]) -> None:
        """Allocate memory, which costs several times what copying does: a page fault per 4 KiB, or pinning."""
        if torch.cuda.is_available():
            torch.cuda.set_device(runtime.device())  # for this thread
        for part in parts:
            room = self._memory.get(part.name)
            if room is None or room.dtype != part.dtype:  # a weight gets its low half with its first gradient
                room = torch.empty(part.tensor.shape, dtype=part.dtype, pin_memory=part.tensor.is_cuda)
                self._memory[part.name] = room.zero_()

    def begin(self, parts: Sequence[Part], optimizer: Optimizer | None, updated: AbstractSet[str]) -> None:
        """Start to copy. Afterwards, a thread must call `finish`, even on errors, because the next update waits for it.

        Args:
            parts: what to copy.
            optimizer: its `step` waits for the copies.
            updated: the names of tensors that only `optimizer.step()` changes.
        """
        if optimizer is None:
            updated = frozenset()
        elif optimizer not in self._hooked:
            optimizer.register_step_pre_hook(lambda *_: self.wait())
            self._hooked.add(optimizer)
        self.make_room(parts)
        on_device = [part for part in parts if part.tensor.is_cuda]
        if on_device:
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._copy([part for part in on_device if part.name not in updated])
                at_once = torch.cuda.current_stream().record_event()
                self._copy([part for part in on_device if part.name in updated])
            self._on_device = self._stream.record_event()
            torch.cuda.current_stream().wait_event(at_once)
        self._copy([part for part in parts if not part.tensor.is_cuda and part.name not in updated])
        self._left = [part for part in parts if not part.tensor.is_cuda and part.name in updated]
        self._copied.clear()

    def finish(self, parts: Sequence[Part]) -> list[Part]:
        """Copy what is left, and return the parts passed to `begin`, as they were then."""
        try:
            self._copy(self._left)
        finally:
            self._left = []
            self._copied.set()
        if self._on_device is not None:
            self._on_device.synchronize()
        return [part._replace(tensor=self._memory[part.name], low=None) for part in parts]

    def wait(self) -> None:
        """Delay changes to tensors until they are copied: blocks the host on a CPU, the device on a GPU."""
        start = time.perf_counter()
        if self._on_device is not None:
            torch.cuda.current_stream().wait_event(self._on_device)
        self._copied.wait()
        self.waited += time.perf_counter() - start

    def _copy(self, parts: Sequence[Part]) -> None:
        for part in parts:
            part.copy_to(self._memory[part.name])
