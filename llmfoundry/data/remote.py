"""Files in object stores and on other machines (`s3://`, `gs://`, `hf://`, ...), read by fsspec through a cache.

A file is fetched whole when it is first read. It is cached under its URL, size and version, and gets its name when it
is complete. When the cache would exceed its limit, the least recently used files are deleted. Credentials come from the
environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ...), never from a YAML.

Other parts of a run read and write stores by the functions below, which retry when the store or the network fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple, TypeVar

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from pydantic import AfterValidator

from llmfoundry.atomic import NO_ROOM
from llmfoundry.config import PLACEHOLDERS, ConfigError, ResourceError, check_placeholders, is_url, local_path, reason

Result = TypeVar("Result")
ATTEMPTS = 5
FIRST_WAIT = 0.5  # seconds before the second attempt; doubled each time
IN_USE = 60.0  # seconds for which a requested file is kept, until it is opened
LIMIT = 10**11  # default limit of the cache, in bytes
# The metadata keys that identify a file's contents or time; each store has its own.
_OF_CONTENTS = ("ETag", "etag", "md5Hash", "blob_id", "last_commit")
_VERSIONS = (*_OF_CONTENTS, "LastModified", "updated", "mtime", "created")
# Errors of the stores' packages for missing or incomplete credentials; retrying does not help.
_WITHOUT_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoAuthTokenError",  # botocore
    "DefaultCredentialsError", "RefreshError",  # google.auth
}  # fmt: skip
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def data_path(path: str) -> str:
    """Return a local path, with `~` expanded, or a URL that fsspec knows.

    Raises:
        ValueError: if the text is neither a local path nor such a URL.
    """
    protocol, separator, rest = path.partition("://")
    if re.match(r"[^/@]*:[^/@]*@", rest):
        raise ValueError(f"{protocol}://...: holds a password; leave it out, credentials are read from the environment")
    if not is_url(path) or (separator and protocol in fsspec.available_protocols()):
        return path if separator else local_path(path)
    raise ValueError(f"{path}: is a URL that is not known; known are s3://, gs://, hf://, and fsspec's others")


DataPath = Annotated[str, AfterValidator(data_path)]


def place(path: str, placeholders: tuple[str, ...] = ()) -> str:
    """Check a folder to write to: a local folder, or one in a store that keeps what is written.

    Args:
        placeholders: those that are filled in later.

    Raises:
        ValueError: if it is neither, or has an unknown placeholder.
    """
    if not path.strip():
        raise ValueError("is empty; name a folder")
    if not is_url(path):
        if (variable := re.search(r"\$\{?(\w+)", path)) is not None:
            raise ValueError(f"{path}: {variable[0]} is not expanded here; write ${{oc.env:{variable[1]}}}")
        return local_path(path, placeholders)
    protocol, _, rest = data_path(check_placeholders(path, placeholders)).partition("://")
    if protocol == "memory":
        raise ValueError(
            f"{path}: is lost when this process ends; name a folder, or a store such as s3://bucket/folder"
        )
    if protocol in _READ_ONLY:
        raise ValueError(
            f"{path}: {protocol}:// can only be read; name a folder, or a store such as s3://bucket/folder"
        )
    if protocol in ("file", "local") and not rest.startswith("/"):
        raise ValueError(f"{path}: is not an absolute path; write it without {protocol}://")
    if protocol in _WITH_BUCKETS and not rest.partition("/")[0]:
        raise ValueError(f"{path}: names no bucket; write {protocol}://BUCKET/FOLDER")
    if _is_pattern(rest) or ".." in rest.split("/"):
        raise ValueError(f"{path}: holds *, ?, [ or .., which stores do not take as they are; choose another name")
    return path


# fsspec protocols that cannot be written to, and those whose paths begin with a bucket or container.
_READ_ONLY = {
    "async_wrapper", "blockcache", "cached", "data", "filecache", "generic", "git", "github", "http", "https",
    "libarchive", "reference", "simplecache", "tar", "zip",
}  # fmt: skip
_WITH_BUCKETS = {"abfs", "abfss", "adl", "az", "gcs", "gs", "oci", "oss", "s3", "s3a"}


def _is_pattern(path: str) -> bool:
    return any(sign in path for sign in "*?[")


Place = Annotated[str, AfterValidator(place)]
PlacePattern = Annotated[str, AfterValidator(partial(place, placeholders=PLACEHOLDERS))]  # it may differ by step


def n_bytes(size: int | str | None) -> int:
    """Parse a size: 100gb, 5e9 or a number of bytes.

    Raises:
        ValueError: if the text is not a size.
    """
    if size is None:
        return LIMIT
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?b)?", str(size).lower())
    if found is None:
        raise ValueError(f"{size!r} is not a valid size; write e.g. 100gb")
    return int(float(found[1]) * _UNITS[found[2] or "b"])


class RemoteFile(NamedTuple):
    """A file in a store."""

    url: str
    size: int
    version: str  # changes when the contents change


class Store:
    """Fetches files into a cache."""

    def __init__(self, cache: Path, limit: int = LIMIT) -> None:
        """Use a cache.

        Args:
            cache: the cache folder (see `cache_root`).
            limit: maximum bytes in the cache, not counting files that were requested within the last minute.
        """
        self._root, self._limit = cache / "remote", limit

    def find(self, url: str) -> dict[str, RemoteFile]:
        """Find the files below a folder, of a glob, or one file, by their names below the folder.

        Raises:
            ConfigError: if nothing was found, access was denied, or the package for this store is not installed.
        """
        fs, path = opened(url)

        def look() -> dict[str, dict]:
            fs.invalidate_cache()
            if fs.isfile(path):
                return {path: fs.info(path)}
            if "*" in path or "?" in path:
                return {name: info for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"}
            return fs.find(path, detail=True)

        found = patiently(url, look)
        if not found:
            raise ConfigError(f"{url}: no such file or folder")
        fixed = [part for part in PurePosixPath(path).parts]
        wild = next((i for i, part in enumerate(fixed) if "*" in part or "?" in part), len(fixed))
        root = PurePosixPath(*fixed[:wild]) if wild < len(fixed) or path not in found else PurePosixPath(path).parent
        return {
            PurePosixPath(name).relative_to(root).as_posix(): _file(fs, name, info)
            for name, info in sorted(found.items())
        }

    def fetch(self, file: RemoteFile) -> Path:
        """Fetch a file to this machine.

        Raises:
            ConfigError: if the file is gone, access was denied, or it is larger than the cache.
            ResourceError: if fetching it has failed ATTEMPTS times.
        """
        name = PurePosixPath(file.url).name
        return self.keep(json.dumps(file), name, file.size, lambda to: fetch(file, to))

    def keep(self, key: str, name: str, size: int, make: Callable[[Path], None]) -> Path:
        """Return a file or folder of the cache; make it first if it does not exist.

        Args:
            key: identifies the contents.
            name: name of the file or folder.
            size: bytes.
            make: writes it.
        """
        if size > self._limit:
            raise ConfigError(f"{name}: has {size:,} bytes, and cache_limit is {self._limit:,}; raise it")
        folder = self._root / hashlib.sha256(key.encode()).hexdigest()[:24]
        target = folder / name
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if target.exists():
                    os.utime(folder)
                    return target
                self._make_room(size)
                temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=self._root))
                try:
                    make(temporary / name)
                    for path in filter(Path.is_file, temporary.rglob("*")):
                        with path.open("rb") as file:
                            os.fsync(file.fileno())
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
                return target
        except OSError as error:
            why = reason(error)
            raise ConfigError(f"{folder}: cannot be written: {why}; set cache_dir to a folder with room") from error

    def _make_room(self, size: int) -> None:
        """Delete the least recently used files until there is room within the limit and on the disk."""
        with FileLock(self._root / "room.lock"):
            found = []
            for folder in self._root.iterdir():
                if folder.is_dir():
                    files = [file for file in folder.rglob("*") if file.is_file()]
                    found.append((folder.stat().st_mtime, sum(file.stat().st_size for file in files), folder))
            held = sum(each[1] for each in found)
            total, limit = held + size, min(self._limit, held + shutil.disk_usage(self._root).free)
            for used, of_folder, folder in sorted(found):
                if total <= limit:
                    return
                if ".tmp-" not in folder.name and time.time() - used >= IN_USE:
                    shutil.rmtree(folder)
                    Path(f"{folder}.lock").unlink(missing_ok=True)
                    total -= of_folder


def listing(url: str) -> dict[str, RemoteFile]:
    """List the files below a folder by their names below it; empty if the folder does not exist.

    Raises:
        ConfigError: if access was denied, or the package for this store is not installed.
        ResourceError: if listing it has failed ATTEMPTS times.
    """
    fs, path = opened(url)

    def look() -> dict[str, dict]:
        fs.invalidate_cache()
        try:
            return fs.find(path, detail=True)
        except FileNotFoundError:
            return {}

    return {
        PurePosixPath(name).relative_to(path).as_posix(): _file(fs, name, info)
        for name, info in sorted(patiently(url, look).items())
        if name != path
    }


def fetch(file: RemoteFile, to: Path) -> None:
    """Copy a file from a store to a local path; the errors are those of `listing`."""
    fs, path = opened(file.url)

    def get() -> None:
        try:
            fs.get_file(path, str(to))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise ConfigError(f"{to}: cannot be written: {error.strerror}; make room on that disk") from None
        if to.stat().st_size != file.size:
            raise OSError(f"{to.stat().st_size} bytes came, and it has {file.size}")

    patiently(file.url, get)


def part_of(file: RemoteFile, start: int, stop: int) -> bytes:
    """Read bytes [start, stop) of a file in a store; the errors are those of `listing`."""
    fs, path = opened(file.url)

    def get() -> bytes:
        found = bytes(fs.cat_file(path, start=start, end=stop))
        if len(found) != stop - start:
            raise OSError(f"{len(found)} bytes came of bytes {start} to {stop}")
        return found

    return patiently(file.url, get)


def fetch_part(file: RemoteFile, start: int, stop: int, to: Path) -> None:
    """Copy bytes [start, stop) to a local path; the errors are those of `listing`.

    Raises:
        ConfigError: if the file has changed since it was found.
    """
    content = part_of(file, start, stop)
    fs, path = opened(file.url)

    def now() -> dict:
        fs.invalidate_cache()
        return fs.info(path)

    info, before = patiently(file.url, now), json.loads(file.version)
    changed = any(key in info and str(info[key]) != before[key] for key in before if key in _OF_CONTENTS)
    if changed or int(info["size"]) != file.size:
        raise ConfigError(f"{file.url}: changed while it was being read; start again when it is complete")
    to.write_bytes(content)


def put(file: Path, url: str) -> None:
    """Copy a local file to a store; it appears there complete or not at all. The errors are those of `listing`."""
    fs, path = opened(url)
    is_local = isinstance(fs, LocalFileSystem)
    size = file.stat().st_size

    def write() -> None:
        target = f"{path}.tmp-{uuid.uuid4().hex[:12]}" if is_local else path  # object stores only show complete objects
        if is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        try:
            fs.put_file(str(file), target)
            fs.invalidate_cache()
            if (came := int(fs.info(target)["size"])) != size:
                raise OSError(f"{came} bytes have arrived of {size}")
            if is_local:
                os.replace(target, path)
        finally:
            if is_local:
                Path(target).unlink(missing_ok=True)

    patiently(url, write, "written")


def put_folder(folder: Path, url: str, last: str) -> None:
    """Replace a folder in a store by a local one; the errors are those of `listing`.

    Args:
        last: name of a file without which the folder is not read: it is removed first and written last.
    """
    delete(f"{url}/{last}")
    delete(url)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix() == last):
        put(path, f"{url}/{path.relative_to(folder).as_posix()}")


def delete(url: str) -> None:
    """Delete a file or a folder in a store, if it exists; the errors are those of `listing`."""
    fs, path = opened(url)

    def remove() -> None:
        fs.invalidate_cache()
        if _is_pattern(path):  # `rm` would delete other files that match it
            for name in fs.find(path):
                fs.rm_file(name)
        elif fs.exists(path):
            fs.rm(path, recursive=True)

    patiently(url, remove, "deleted")


def opened(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{url}: needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{url}: cannot be read: {error}") from None
    return fs, str(path).rstrip("/")


def _file(fs: fsspec.AbstractFileSystem, name: str, info: dict) -> RemoteFile:
    return RemoteFile(fs.unstrip_protocol(name), int(info["size"]), _version(info))


def _version(info: dict) -> str:
    return json.dumps({key: str(info[key]) for key in _VERSIONS if info.get(key)})


def patiently(url: str, act: Callable[[], Result], done: str = "read") -> Result:
    """Call `act` and retry when a store or the network fails. Missing files and denied access fail at once.

    Args:
        done: what `act` does to `url`, for messages.
    """
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return act()
        except ConfigError:
            raise
        except FileNotFoundError as error:
            why = "no such file or folder" if done == "read" else f"cannot be {done}: {_said(error)}"
            raise ConfigError(f"{url}: {why}") from None
        except PermissionError as error:
            raise ConfigError(
                f"{url}: may not be {done}: {_said(error)}; credentials are read from the environment"
            ) from None
        except Exception as error:  # each store raises its own types
            if type(error).__name__ in _WITHOUT_CREDENTIALS:
                raise ConfigError(
                    f"{url}: may not be {done}: {_said(error)}; credentials are read from the environment, e.g. "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from None
            if attempt == ATTEMPTS:
                raise ResourceError(f"{url}: cannot be {done} after {ATTEMPTS} attempts: {_said(error)}") from error
        time.sleep(wait)
        wait *= 2
    raise AssertionError


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
