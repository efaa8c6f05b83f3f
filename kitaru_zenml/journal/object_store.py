"""The store on S3, Google Cloud Storage and Azure Blob Storage, through obstore, with conditional creates.

A create is one PUT with `If-None-Match: *`, which these stores decide atomically. obstore sends a request again after a 5xx or a broken
connection; when the first one had been committed after all, the second answers "already exists" for our own object. So on that answer the
object is read and compared: equal bytes (every object carries its writer's nonce) mean that we won.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from kitaru_zenml.errors import BucketNotFound, StoreAccessDenied, StoreNotConditional, StoreUnavailable
from kitaru_zenml.journal.store import ObjectNotFound

T = TypeVar("T")
PATIENCE = 30.0  # seconds that one operation is tried for
READERS = 24  # concurrent reads of `get_many`
CLIENT_OPTIONS: dict[str, Any] = {"timeout": timedelta(seconds=20), "connect_timeout": timedelta(seconds=5)}


def retry_options(patience: float = PATIENCE) -> dict[str, Any]:
    """How obstore retries by itself: 5xx, timeouts and broken connections, for `patience` seconds."""
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=4), "base": 2}
    return {"max_retries": 12, "retry_timeout": timedelta(seconds=patience), "backoff": backoff}


class ObjectStore:
    """Objects in a bucket; see `kitaru_zenml.journal.store.Store`.

    Args:
        client: An obstore store whose root is the artifact store's root.
        uri: The artifact store's root, as ZenML names it.
        patience: Seconds that an operation is tried for when the store answers with a conflict; obstore's own retries are the client's.
    """

    def __init__(self, client: Any, uri: str, patience: float = PATIENCE) -> None:
        self._client, self._uri, self._patience = client, uri.rstrip("/"), patience

    @property
    def uri(self) -> str:
        """The artifact store's root."""
        return self._uri

    # --- writing ---

    def create(self, name: str, data: bytes) -> bytes | None:
        """See `Store.create`."""
        action, deadline = f"create `{name}`", time.monotonic() + self._patience
        while True:
            try:
                obstore.put(self._client, name, data, mode="create", use_multipart=False)
                return None
            except AlreadyExistsError:
                try:
                    stored = self.get(name)
                    return None if stored == data else stored
                except ObjectNotFound:  # deleted meanwhile
                    self._conflict(action, deadline, "the object appears and disappears")
            except PreconditionError as error:  # 409: a concurrent create is being decided
                self._conflict(action, deadline, _first_line(error))
                time.sleep(0.05)
            except Exception as error:
                raise self._translated(error, action) from error

    async def create_async(self, name: str, data: bytes) -> bytes | None:
        """See `Store.create_async`."""
        action, deadline = f"create `{name}`", time.monotonic() + self._patience
        while True:
            try:
                await obstore.put_async(self._client, name, data, mode="create", use_multipart=False)
                return None
            except AlreadyExistsError:
                try:
                    stored = bytes(await (await obstore.get_async(self._client, name)).bytes_async())
                    return None if stored == data else stored
                except (NotFoundError, FileNotFoundError):
                    self._conflict(action, deadline, "the object appears and disappears")
                except Exception as error:
                    raise self._translated(error, action) from error
            except PreconditionError as error:
                self._conflict(action, deadline, _first_line(error))
                await asyncio.sleep(0.05)
            except Exception as error:
                raise self._translated(error, action) from error

    def overwrite(self, name: str, data: bytes) -> None:
        """See `Store.overwrite`."""
        self._try(f"overwrite `{name}`", lambda: obstore.put(self._client, name, data, use_multipart=False))

    def delete(self, names: Iterable[str]) -> None:
        """See `Store.delete`."""
        doomed = list(names)
        if doomed:
            try:
                obstore.delete(self._client, doomed)
            except (NotFoundError, FileNotFoundError):
                for name in doomed if len(doomed) > 1 else ():
                    self.delete([name])
            except Exception as error:
                raise self._translated(error, "delete objects") from error

    # --- reading ---

    def get(self, name: str) -> bytes:
        """See `Store.get`."""
        try:
            return bytes(obstore.get(self._client, name).bytes())
        except (NotFoundError, FileNotFoundError) as error:
            if (missing := _missing_bucket(error)) is not None:
                raise BucketNotFound(self._uri, f"read `{name}`", missing) from error
            raise ObjectNotFound(name) from None
        except Exception as error:
            raise self._translated(error, f"read `{name}`") from error

    def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """See `Store.get_many`. obstore lets other threads run while it waits, so threads are what overlaps the reads."""

        def get(name: str) -> bytes | None:
            try:
                return self.get(name)
            except ObjectNotFound:
                return None

        if len(names) < 2:
            return [get(name) for name in names]
        with ThreadPoolExecutor(min(READERS, len(names)), thread_name_prefix="kitaru-read") as pool:
            return list(pool.map(get, names))

    def list(self, prefix: str) -> list[str]:
        """See `Store.list`."""
        found: list[str] = []

        def collect() -> None:
            found.clear()
            for batch in obstore.list(self._client, prefix):
                found.extend(str(meta["path"]) for meta in batch)

        self._try(f"list `{prefix}`", collect)
        return sorted(name for name in found if name.startswith(prefix))

    # --- what went wrong ---

    def _try(self, action: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            raise self._translated(error, action) from error

    def _conflict(self, action: str, deadline: float, reason: str) -> None:
        if time.monotonic() > deadline:
            raise StoreUnavailable(self._uri, action, reason)

    def _translated(self, error: Exception, action: str) -> StoreUnavailable | StoreNotConditional:
        reason = _first_line(error)
        if isinstance(error, StoreUnavailable):
            return error
        if isinstance(error, NotSupportedError | NotImplementedError):
            return StoreNotConditional(self._uri, reason)
        if (missing := _missing_bucket(error)) is not None:
            return BucketNotFound(self._uri, action, missing)
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        if denied or any(word in str(error) for word in _DENIALS):
            return StoreAccessDenied(self._uri, action, reason)
        return StoreUnavailable(self._uri, action, reason)


_DENIALS = (
    "ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403 Forbidden", "credential",
    "401 Unauthorized",
)  # fmt: skip


def _missing_bucket(error: BaseException) -> str | None:
    text = str(error)
    if any(word in text for word in ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")):
        return "the bucket does not exist"
    return None


def _first_line(error: BaseException) -> str:
    """The gist of an obstore error, whose text has the whole request behind it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, BaseError) and len(text) < 400 else text[:400]
