"""Named limits of steps: at most so many bodies of `@checkpoint(limit="provider")` at once, in all processes that one worker started.

A slot is an exclusive `flock` on one of as many files as the limit has slots, in a folder that the worker makes: the kernel frees it with
the process, so a killed process never keeps one. Sizes come from the worker by environment; without a worker, or a size, nothing binds.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

LIMITS = "KITARU_STEP_LIMITS"  # environment: {"folder": ..., "sizes": {"provider": 4}}
LOOK = 0.05  # seconds between two looks for a free slot


@dataclass(frozen=True)
class Limits:
    """The sizes that the worker gave, and where their slots are."""

    folder: Path
    sizes: dict[str, int]

    def to_environment(self) -> str:
        """For `LIMITS`."""
        return json.dumps({"folder": str(self.folder), "sizes": self.sizes})

    def binds(self, limit: str | None) -> bool:
        """Whether a limit has a size here."""
        return limit is not None and limit in self.sizes

    def try_slot(self, limit: str) -> Slot | None:
        """Take a free slot; never blocks.

        Args:
            limit: One that binds.

        Returns:
            The slot, or `None` if all are taken.
        """
        size = self.sizes[limit]
        first = random.randrange(size)
        for at in range(size):
            number = (first + at) % size
            descriptor = os.open(self.folder / f"{limit}.{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            except BaseException:
                os.close(descriptor)
                raise
            return Slot(descriptor)
        return None


class Slot:
    """A held slot."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Free it; once is enough."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


NO_LIMITS = Limits(Path(), {})


@functools.cache
def limits_of_process() -> Limits:
    """What the worker that started this process said; nothing binds in any other process."""
    told = os.environ.get(LIMITS)
    if not told:
        return NO_LIMITS
    found = json.loads(told)
    return Limits(Path(found["folder"]), {name: int(size) for name, size in found["sizes"].items()})
