"""What a fork reuses of its origin: one pure decision over the origin's records, without I/O.

The cut is a place in the order of delivery, never a time: a record with a lower number than the one that was next when the cut step's
body began was finished before it, whatever the clocks said. Each record says that number of itself (`StepRecord.began`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kitaru_zenml.journal.records import StepRecord

Reuse = Literal["before", "unchanged"]


@dataclass(frozen=True)
class Selection:
    """What a fork reuses.

    Attributes:
        cut: Records with a lower number were finished before the cut began.
        keys: Of the reused records.
    """

    cut: int
    keys: frozenset[str]


def select(
    records: Mapping[str, StepRecord], start: StepRecord | None, overridden: Sequence[StepRecord], reuse: Reuse
) -> Selection:
    """Decide what is reused.

    Args:
        records: The origin's records that answer calls, by key.
        start: The step to run from; by default the overridden step that began first. With neither, the fork runs from the beginning.
        overridden: The steps whose outcome a person gave.
        reuse: `before` reuses what was finished before the cut began. `unchanged` reuses later successes as well; which of them answer
            a call, the engine decides by the inputs it is asked with.
    """
    cut_at = [start] if start is not None else list(overridden)
    cut = min((began(record) for record in cut_at), default=0)
    anew = {record.path for record in (*cut_at, *overridden)}
    around = {scope.path for record in (*cut_at, *overridden) for scope in record.scopes}
    reused: dict[str, StepRecord] = {}
    for key, record in records.items():
        if record.path == "/" or record.path in anew or record.path in around or _is_inside(record, anew):
            continue
        if record.number < cut or (reuse == "unchanged" and record.failure is None):
            reused[key] = record
    if reuse == "unchanged":  # what failed inside a reused step belongs to it
        finished = {record.path for record in reused.values()}
        reused |= {key: r for key, r in records.items() if _is_inside(r, finished) and not _is_inside(r, anew)}
    return Selection(cut, frozenset(reused))


def began(record: StepRecord) -> int:
    """The number that was next when a step began; of a record of an older version, its own, so that more is reused."""
    return record.began if record.began >= 0 else record.number


def _is_inside(record: StepRecord, paths: Collection[str]) -> bool:
    return any(scope.path in paths for scope in record.scopes)
