"""The store of a leg that dies: counts the operations of the flow's own threads and kills the process with SIGKILL at one of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kitaru_zenml.journal.local import LocalStore
from kitaru_zenml.journal.store import Store

BACKGROUND = (
    "kitaru-lease",
    "kitaru-recorder",
    "kitaru-conditions",
    "kitaru-child",
)  # their operations come when they come: not part of the count
WHEN = ("before", "middle", "after")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class KillingStore:
    """A store that is killed at its operation number `at` (from 1): before it, in the middle of it, or after it.

    With `recorder`, the operations of lineage's thread are counted instead of the flow's.
    """

    def __init__(self, inner: Store, at: int, when: str, log: Path, recorder: bool = False) -> None:
        self.inner, self.at, self.when, self.log, self.recorder = inner, at, when, log, recorder
        self.lock, self.count = threading.Lock(), 0

    @property
    def uri(self) -> str:
        return self.inner.uri

    def _point(self, what: str) -> bool:
        """Count an operation; whether it is the one."""
        name = threading.current_thread().name
        mine = name.startswith("kitaru-recorder") if self.recorder else not name.startswith(BACKGROUND)
        if not mine:
            return False
        with self.lock:
            self.count += 1
            count = self.count
        with self.log.open("a") as file:
            file.write(f"{count} {what}\n")
        return count == self.at

    def _around(self, what: str, work: Callable[[], Any]) -> Any:
        if not self._point(what):
            return work()
        if self.when == "before":
            die()
        if self.when == "middle":
            self._arm()
        result = work()
        die()
        return result

    def _arm(self) -> None:
        if isinstance(self.inner, LocalStore):  # the content is on disk, the name is not given
            self.inner._link = lambda *_: die()  # type: ignore[method-assign, assignment]
        else:  # the request is under way
            threading.Timer(0.001, die).start()

    def create(self, name: str, data: bytes) -> bytes | None:
        answer: bytes | None = self._around(f"create {name}", lambda: self.inner.create(name, data))
        return answer

    async def create_async(self, name: str, data: bytes) -> bytes | None:
        if not self._point(f"create {name}"):
            return await self.inner.create_async(name, data)
        if self.when == "before":
            die()
        if self.when == "middle":
            self._arm()
        answer = await self.inner.create_async(name, data)
        die()
        return answer

    def overwrite(self, name: str, data: bytes) -> None:
        self._around(f"overwrite {name}", lambda: self.inner.overwrite(name, data))

    def get(self, name: str) -> bytes:
        return bytes(self._around(f"get {name}", lambda: self.inner.get(name)))

    def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = self._around("get_many", lambda: self.inner.get_many(names))
        return found

    def list(self, prefix: str) -> list[str]:
        found: list[str] = self._around(f"list {prefix}", lambda: self.inner.list(prefix))
        return found

    def delete(self, names: Iterable[str]) -> None:
        self._around("delete", lambda: self.inner.delete(names))
