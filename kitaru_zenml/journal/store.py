"""The object store as the journal sees it: one protocol, one primitive.

`create` is the only write that decides anything: it makes an object if none has that name (an exclusive link on a local disk,
`If-None-Match: *` on an object store). There is no compare-and-swap, because S3s disagree about ETags. Names are relative to
the root of the ZenML artifact store and use `/`. Everything raised is a `StoreUnavailable` or one of its kinds, except
`ObjectNotFound`, which callers expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class ObjectNotFound(Exception):
    """No object has this name. An expected answer, never shown to a person."""


class Store(Protocol):
    """A place for small immutable objects. Safe to use from many threads and event loops at once."""

    @property
    def uri(self) -> str:
        """Root of the artifact store, as ZenML names it."""

    def create(self, name: str, data: bytes) -> bytes | None:
        """Store an object durably if none has this name.

        A write that the store committed but reported as failed (a lost reply, retried) counts as done: the object found under
        the name is compared with `data`, and whoever writes puts a nonce into it. So two writers never both believe they won.

        Args:
            name: Name relative to the artifact store's root.
            data: The whole content.

        Returns:
            `None` if `data` is now what is stored there; else the bytes that somebody else stored first.

        Raises:
            StoreUnavailable: If the store did not take the object after all retries; it may have stored it all the same.
        """

    async def create_async(self, name: str, data: bytes) -> bytes | None:
        """`create` for an event loop: never blocks it."""

    def overwrite(self, name: str, data: bytes) -> None:
        """Store an object whether or not the name is taken. Atomic for readers; only heartbeats use it."""

    def get(self, name: str) -> bytes:
        """The content of an object.

        Raises:
            ObjectNotFound: If no object has this name.
            StoreUnavailable: If the store did not answer after all retries.
        """

    def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """The contents of many objects, fetched at once, in the order of `names`; `None` for one that does not exist."""

    def list(self, prefix: str) -> list[str]:
        """The full names of all objects below a folder (`prefix` ends in `/`), recursively and sorted."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that do not exist are no error."""
