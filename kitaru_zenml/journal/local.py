"""The store on a local disk, written by hand because its latency is the latency of every step.

An object is made in a temporary file of its own folder, synced, given its name by an exclusive hard link, and then the folder is
synced: one file sync and one folder sync are all that an acknowledged step costs. So a name exists only with its whole content,
whatever is killed when. Everything happens relative to an open descriptor of the folder: a folder that is deleted meanwhile gives
an error, never a silent write elsewhere. Concurrent creates overlap their syncs, which the filesystem then commits as one.

Whoever reads a name before its creator has synced the folder could act on an object that a power cut takes back. Therefore the
loser of a race, and `get_many` (what a resume replays), sync the folder before they answer.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from kitaru_zenml.errors import BucketNotFound, StoreAccessDenied, StoreFull, StoreNotConditional, StoreUnavailable
from kitaru_zenml.journal.store import ObjectNotFound

_TEMPORARY = ".kitaru-tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_VANISHED = 5  # tries of a create whose folder is removed meanwhile
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

THREADS = 16  # a create waits for the disk, not for the processor: as many as shall overlap their syncs

_pool: ThreadPoolExecutor | None = None


def _store_threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(THREADS, thread_name_prefix="kitaru-store")
    return _pool


def _forget_threads() -> None:
    global _pool
    _pool = None  # threads do not survive a fork


os.register_at_fork(after_in_child=_forget_threads)


class LocalStore:
    """Objects as files below a folder; see `kitaru_zenml.journal.store.Store`.

    Args:
        root: The artifact store's root folder. It must exist: a missing root is a wrong path or an absent mount, and making it
            would hide that.
    """

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(os.path.expanduser(root))
        self._durable: set[str] = set()  # folders whose own entries were synced up to the root by this process

    @property
    def uri(self) -> str:
        """The root folder."""
        return self._root

    # --- writing ---------------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bytes | None:
        """See `Store.create`."""
        action = f"create `{name}`"
        parent, leaf = self._split(name)
        for _ in range(_VANISHED):
            with self._translated(action):
                try:
                    return self._create(parent, leaf, data)
                except FileNotFoundError:
                    # The folder was removed under our feet, or the winner's object between link and read: neither is stored now.
                    self._forget(parent)
        raise StoreUnavailable(self._root, action, "its folder or the object is removed again and again while we write")

    def _create(self, parent: str, leaf: str, data: bytes) -> bytes | None:
        folder = self._open_folder(parent)
        try:
            temporary = self._write_temporary(folder, data)
            try:
                won = self._link(folder, temporary, leaf)
            finally:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
            os.fsync(folder)
            if won:
                return None
            stored = _read(leaf, folder)
            return None if stored == data else stored
        finally:
            os.close(folder)

    async def create_async(self, name: str, data: bytes) -> bytes | None:
        """See `Store.create_async`."""
        return await asyncio.get_running_loop().run_in_executor(_store_threads(), self.create, name, data)

    def overwrite(self, name: str, data: bytes) -> None:
        """See `Store.overwrite`. The folder is not synced: the beat that a power cut takes back said only that we were alive."""
        with self._translated(f"overwrite `{name}`"):
            parent, leaf = self._split(name)
            folder = self._open_folder(parent)
            try:
                temporary = self._write_temporary(folder, data)
                try:
                    os.rename(temporary, leaf, src_dir_fd=folder, dst_dir_fd=folder)
                except OSError:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=folder)
                    raise
            finally:
                os.close(folder)

    def delete(self, names: Iterable[str]) -> None:
        """See `Store.delete`."""
        folders = set()
        for name in names:
            with self._translated(f"delete `{name}`"):
                parent, leaf = self._split(name)
                try:
                    os.unlink(os.path.join(parent, leaf))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                folders.add(parent)
        for parent in folders:
            with self._translated(f"delete from `{parent}`"):
                _sync_folder(parent)

    def _write_temporary(self, folder: int, data: bytes) -> str:
        temporary = _TEMPORARY + os.urandom(8).hex()
        file = os.open(temporary, _FILE_FLAGS, 0o644, dir_fd=folder)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        finally:
            os.close(file)
        return temporary

    def _link(self, folder: int, temporary: str, leaf: str) -> bool:
        try:
            os.link(temporary, leaf, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                reason = "its filesystem has no hard links, which an exclusive create needs"
                raise StoreNotConditional(self._root, reason) from error
            raise
        return True

    # --- reading ---------------------------------------------------------------------------------------------------------

    def get(self, name: str) -> bytes:
        """See `Store.get`."""
        with self._translated(f"read `{name}`"):
            try:
                return _read(os.path.join(*self._split(name)))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                self._require_root()
        raise ObjectNotFound(name)

    def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """See `Store.get_many`."""
        found: list[bytes | None] = []
        folders = set()
        for name in names:
            try:
                found.append(self.get(name))
                folders.add(self._split(name)[0])
            except ObjectNotFound:
                found.append(None)
        for parent in folders:
            with suppress(OSError):  # a folder that we may only read
                _sync_folder(parent)
        return found

    def list(self, prefix: str) -> list[str]:
        """See `Store.list`."""
        with self._translated(f"list `{prefix}`"):
            top = os.path.join(*self._split(prefix.rstrip("/"))) if prefix.strip("/") else self._root
            if not os.path.isdir(top):
                self._require_root()
            return sorted(self._walk(top))

    def _walk(self, folder: str) -> Iterator[str]:
        try:
            entries = os.scandir(folder)
        except (FileNotFoundError, NotADirectoryError):  # never made, or removed since its parent was read
            return
        with entries:
            for entry in entries:
                if entry.is_dir():
                    yield from self._walk(entry.path)
                elif not entry.name.startswith(_TEMPORARY):
                    yield os.path.relpath(entry.path, self._root)

    # --- folders ---------------------------------------------------------------------------------------------------------

    def _split(self, name: str) -> tuple[str, str]:
        path = f"{self._root}/{name}"
        if f"/{name}/".find("/../") >= 0:
            raise StoreUnavailable(self._root, f"reach `{name}`", "the name leaves the artifact store")
        parent, _, leaf = path.rpartition("/")
        return parent, leaf

    def _open_folder(self, parent: str) -> int:
        """A descriptor of the folder, made if absent, whose own entry is durable."""
        if parent not in self._durable:
            self._make_durable(parent)
        try:
            return os.open(parent, _FOLDER_FLAGS)
        except FileNotFoundError:
            self._forget(parent)
            self._make_durable(parent)
            return os.open(parent, _FOLDER_FLAGS)

    def _make_durable(self, parent: str) -> None:
        """Make the folder if absent, and sync the folders that name it, also if another process made it and died before its sync."""
        self._require_root()
        folder = self._root
        for part in parent[len(self._root) :].strip("/").split("/"):
            above, folder = folder, f"{folder}/{part}".rstrip("/")
            if folder in self._durable:
                continue
            with suppress(FileExistsError):
                os.mkdir(folder)
            _sync_folder(above)
            self._durable.add(folder)

    def _forget(self, parent: str) -> None:
        folder = parent
        while len(folder) >= len(self._root):
            self._durable.discard(folder)
            folder = folder.rpartition("/")[0]

    def _require_root(self) -> None:
        try:
            mode = os.stat(self._root).st_mode
        except FileNotFoundError as error:
            reason = "the folder does not exist (a wrong path, or a disk that is not mounted)"
            raise BucketNotFound(self._root, "open its folder", reason) from error
        if not stat.S_ISDIR(mode):
            raise BucketNotFound(self._root, "open its folder", "it is a file, not a folder")

    @contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(action, error) from error

    def _error(self, action: str, error: OSError) -> StoreUnavailable:
        kind: Callable[[str, str, str], StoreUnavailable] = StoreUnavailable
        if error.errno in _FULL:
            kind = StoreFull
        elif error.errno in _DENIED:
            kind = StoreAccessDenied
        return kind(self._root, action, error.strerror or str(error))


def _read(path: str, folder: int | None = None) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        size = os.fstat(file).st_size
        parts = []
        while part := os.read(file, max(size + 1, 4096)):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(file)


def _sync_folder(path: str) -> None:
    folder = os.open(path, _FOLDER_FLAGS)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
