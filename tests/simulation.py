"""Legs of a run without ZenML and without processes: the real engine over a store in memory that crashes at a chosen write.

For properties that need thousands of legs. What a real SIGKILL does is tested in `tests/crash`.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kitaru_zenml.execution import Ended, Execution
from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.lease import take_lease
from kitaru_zenml.journal.store import ObjectNotFound
from kitaru_zenml.options import FlowOptions


class Crash(BaseException):
    """The process of this leg is dead."""


class MemoryStore:
    """Objects in a dict; each write takes a random while, and a leg dies at its `crash_after`-th record."""

    uri = "memory://"

    def __init__(self, objects: dict[str, bytes] | None = None, *, crash_after: int | None = None, seed: float = 0) -> None:
        self.objects: dict[str, bytes] = {} if objects is None else objects
        self.crash_after, self.random, self.writes, self.dead = crash_after, random.Random(seed), 0, False
        self._lock = threading.Lock()

    def _commit(self, name: str, data: bytes) -> bytes | None:
        with self._lock:
            if self.dead:
                raise Crash
            if "/steps/" in name:
                self.writes += 1
                if self.crash_after is not None and self.writes > self.crash_after:
                    self.dead = True
                    raise Crash
            theirs = self.objects.setdefault(name, data)
            return None if theirs == data else theirs

    def create(self, name: str, data: bytes) -> bytes | None:
        time.sleep(self.random.random() * 0.002)
        return self._commit(name, data)

    async def create_async(self, name: str, data: bytes) -> bytes | None:
        await asyncio.sleep(self.random.random() * 0.002)
        return self._commit(name, data)

    def overwrite(self, name: str, data: bytes) -> None:
        if not self.dead:
            self.objects[name] = data

    def get(self, name: str) -> bytes:
        try:
            return self.objects[name]
        except KeyError:
            raise ObjectNotFound(name) from None

    def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        return [self.objects.get(name) for name in names]

    def list(self, prefix: str) -> list[str]:
        return sorted(name for name in self.objects if name.startswith(prefix))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.objects.pop(name, None)


def run_leg(
    store: MemoryStore,
    flow: Callable[..., Any],
    parameters: dict[str, Any] | None = None,
    *,
    options: FlowOptions | None = None,
    on_drift: str = "raise",
    run_id: str = "run",
) -> tuple[Ended, Execution]:
    """Run one leg of a run whose journal is in `store`; raises `Crash` if it died."""
    journal = Journal(store, run_id)
    lease = take_lease(journal, purpose="run", takeover=True)
    snapshot = journal.load()
    execution = Execution(
        journal=journal, lease=lease, snapshot=snapshot, options=options or FlowOptions(), on_drift=on_drift, recorder=None,
        materializers=None,
    )  # fmt: skip
    ended = execution.run(flow, parameters or {}, "simulated", Any)
    if getattr(store, "dead", False) or isinstance(ended.error, Crash):
        raise Crash
    return ended, execution
