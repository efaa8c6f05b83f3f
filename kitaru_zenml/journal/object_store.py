"""The store on S3, Google Cloud Storage and Azure Blob Storage, through obstore, with conditional creates.

A create is one PUT with `If-None-Match: *`, which these stores decide atomically. obstore sends a request again after a 5xx or a broken
connection, but not a PUT that timed out, so that is done here. When the first one had been committed after all, the second answers
"already exists" for our own object. So on that answer the object is read and compared: equal bytes (every object carries its writer's
nonce) mean that we won. A store that answers so (409) while a concurrent create is being decided has no object to read yet: try again.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
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
# A request may wait 20 s for the store to say something; a large download that keeps coming may take longer in all.
CLIENT_OPTIONS: dict[str, Any] = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=20),
    "timeout": timedelta(minutes=10),
}


def retry_options(patience: float = PATIENCE) -> dict[str, Any]:
    """How obstore retries by itself: 5xx, broken connections and reads that timed out, for `patience` seconds."""
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=4), "base": 2}
    return {"max_retries": 12, "retry_timeout": timedelta(seconds=patience), "backoff": backoff}


class ObjectStore:
    """Objects in a bucket; see `kitaru_zenml.journal.store.Store`.

    Args:
        client: An obstore store whose root is the artifact store's root.
        uri: The artifact store's root, as ZenML names it.
        patience: Seconds that a create is tried for when it conflicts or times out; obstore's own retries are the client's.
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
        action, pauses = f"create `{name}`", _pauses(self._patience)
        while True:
            try:
                obstore.put(self._client, name, data, mode="create", use_multipart=False)
                return None
            except AlreadyExistsError as conflict:
                try:
                    stored = self.get(name)
                    return None if stored == data else stored
                except ObjectNotFound:
                    pause = self._pause(conflict, action, pauses)
            except Exception as error:
                pause = self._pause(error, action, pauses)
            time.sleep(pause)

    async def create_async(self, name: str, data: bytes) -> bytes | None:
        """See `Store.create_async`."""
        action, pauses = f"create `{name}`", _pauses(self._patience)
        while True:
            try:
                await obstore.put_async(self._client, name, data, mode="create", use_multipart=False)
                return None
            except AlreadyExistsError as conflict:
                try:
                    stored = bytes(await (await obstore.get_async(self._client, name)).bytes_async())
                    return None if stored == data else stored
                except (NotFoundError, FileNotFoundError):
                    pause = self._pause(conflict, action, pauses)
                except Exception as error:
                    raise self._translated(error, f"read `{name}`") from error
            except Exception as error:
                pause = self._pause(error, action, pauses)
            await asyncio.sleep(pause)

    def _pause(self, error: Exception, action: str, pauses: Iterator[float]) -> float:
        """How long to wait before a create is tried again; raises if that is in vain or patience is over."""
        if isinstance(error, AlreadyExistsError | PreconditionError) or "HTTP error: " in _said(error):
            pause = next(pauses, None)
            if pause is not None:
                return pause
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

    def _translated(self, error: Exception, action: str) -> StoreUnavailable | StoreNotConditional:
        if isinstance(error, StoreUnavailable):
            return error
        said, codes = _said(error), _codes(error)
        if isinstance(error, NotSupportedError | NotImplementedError) or _STATUS + "501" in said:
            return StoreNotConditional(self._uri, said)
        if (missing := _missing_bucket(error)) is not None:
            return BucketNotFound(self._uri, action, missing)
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        if denied or codes & _DENIALS or "Error performing token request" in said:
            return StoreAccessDenied(self._uri, action, said)
        return StoreUnavailable(self._uri, action, said)


_STATUS = "status code: "
_DENIALS = {
    "AccessDenied", "AuthenticationFailed", "AuthorizationFailure", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken",
    "SignatureDoesNotMatch",
}  # fmt: skip


def _pauses(patience: float) -> Iterator[float]:
    """Growing pauses with jitter, for as long as patience lasts."""
    deadline, pause = time.monotonic() + patience, 0.05
    while time.monotonic() < deadline:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, 2.0)


def _codes(error: BaseException) -> set[str]:
    """The error codes in the store's answer. Never looked for in the whole text, which has the object's name in it."""
    return set(re.findall(r"<Code>(\w+)</Code>", str(error)))


def _missing_bucket(error: BaseException) -> str | None:
    answer = _said(error).partition(_STATUS)[2]
    if _codes(error) & {"NoSuchBucket", "ContainerNotFound"} or "The specified bucket does not exist" in answer:
        return "the bucket does not exist"
    return None


def _said(error: BaseException) -> str:
    """The gist of an obstore error, in one line: what it did, and the store's answer."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split()) or type(error).__name__
    return text if len(text) < 600 else text[:600] + "..."
