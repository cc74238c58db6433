"""Random access to large files in a store. Blocks that are read are fetched into the bounded cache of remote.py."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

from llmfoundry.config import ConfigError
from llmfoundry.data.open_file import OpenFile
from llmfoundry.data.remote import RemoteFile, Store, fetch_part, part_of

BLOCK = 2**26  # bytes fetched at a time
_OPEN_BLOCKS = 16  # blocks kept open per file


class StoredFile:
    """A file in a store, with the methods of `OpenFile`."""

    def __init__(self, file: RemoteFile, store: Store) -> None:
        self.path, self.size = Path(file.url.partition("://")[2]), file.size
        self._file, self._store = file, store
        self._open: OrderedDict[int, OpenFile] = OrderedDict()

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes [start, stop).

        Raises:
            ConfigError: if the file is gone, or one of its blocks is larger than the cache.
            ResourceError: if a block could not be fetched.
        """
        parts = []
        while start < stop:
            number, at = divmod(start, BLOCK)
            end = min(stop - number * BLOCK, BLOCK)
            parts.append(self._block(number).read(at, end))
            start += end - at
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def sample(self, start: int, stop: int) -> bytes:
        """Read a few bytes without fetching their blocks; the errors are those of `read`."""
        return part_of(self._file, start, stop)

    def _block(self, number: int) -> OpenFile:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        start, stop = number * BLOCK, min(number * BLOCK + BLOCK, self.size)
        key, name = json.dumps([*self._file, start, stop]), f"{self.path.name}.{number:05d}"
        place = self._store.keep(key, name, stop - start, lambda to: fetch_part(self._file, start, stop, to))
        try:
            found = OpenFile(place)
        except OSError as error:
            raise ConfigError(f"{place}: cannot be read: {error.strerror}") from None
        self._open[number] = found
        if len(self._open) > _OPEN_BLOCKS:
            self._open.popitem(last=False)
        return found
