"""The key-value cache for generation.

Shapes: B rows, S new tokens, P all tokens so far, G kv heads, C head_dim.
"""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values (or latents) of one layer's earlier tokens, in buffers that grow by doubling."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values.

        Args:
            k: (B, G, S, C).
            v: (B, G, S, C); its C may differ from that of `k`.

        Returns:
            All keys and values so far, (B, G, P, C) each, as views of buffers that the next call extends.
        """
        end = self.length + k.shape[2]
        if self._buffers is None or end > self.capacity:
            self.capacity = max(end, self.capacity if self._buffers is None else 2 * self.capacity)
            self._buffers = (self._grown(k, 0), self._grown(v, 1))
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        return self._buffers[0][:, :, :end], self._buffers[1][:, :, :end]

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens."""
        self.length = min(self.length, length)

    def _grown(self, new: Tensor, which: int) -> Tensor:
        buffer = new.new_empty(new.shape[0], new.shape[1], self.capacity, new.shape[3])
        if self._buffers is not None:
            buffer[:, :, : self.length] = self._buffers[which][:, :, : self.length]
        return buffer
