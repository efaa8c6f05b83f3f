"""Who may execute a run now: epoch n belongs to whoever created `lease/<n>.json`.

Taking a lease is one create, so of several takers one wins. The holder overwrites `lease/<n>.beat` as long as it lives. A lease has
lapsed when its beat said "released", when its holder is a process of this machine that is gone, or when its beat has not changed
for the lapse time as watched by the taker's own clock: clocks of different machines are never compared.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

from kitaru_zenml.errors import LeaseLost, RunIsLeased, StoreUnavailable
from kitaru_zenml.journal.journal import Journal, new_nonce
from kitaru_zenml.journal.records import Beat, Holder, InFlight, Lease, beat_name, lease_name, run_folder, seal, unseal

LAPSE_SECONDS = 30.0


@functools.cache
def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # containers of one machine share the boot id, not the pids
    except OSError:
        return f"{socket.gethostname()} {int(psutil.boot_time())}"


def this_process() -> Holder:
    """This process as a lease holder."""
    return Holder(host=socket.gethostname(), boot=_boot(), pid=os.getpid(), started=psutil.Process().create_time())


def is_gone(holder: Holder) -> bool:
    """Whether a holder is known to be dead: a process of this machine that no longer runs."""
    if holder.boot != _boot():
        return False
    try:
        process = psutil.Process(holder.pid)
        return bool(abs(process.create_time() - holder.started) > 1 or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class HeldLease:
    """An epoch that this process holds. Thread-safe."""

    def __init__(self, journal: Journal, lease: Lease) -> None:
        self.journal, self.lease = journal, lease
        self.epoch = lease.epoch
        self.lost: LeaseLost | None = None
        self.checked_at = time.monotonic()
        self._count = 0

    @property
    def watch_seconds(self) -> float:
        """How often the holder looks for a newer epoch."""
        return min(2.0, self.lease.lapse_seconds / 10)

    @property
    def is_stale(self) -> bool:
        """Whether this process was held up (stopped, swapped out) since it last looked: it must look before it goes on."""
        return time.monotonic() - self.checked_at > 2 * self.watch_seconds + 0.5

    def check(self) -> None:
        """Look whether a newer epoch exists.

        Raises:
            LeaseLost: If somebody has taken the run over.
        """
        if self.lost is None and (newer := self.journal.lease(self.epoch + 1)) is not None:
            self.lost = LeaseLost(self.journal.run_id, self.epoch, str(newer.holder))
        self.checked_at = time.monotonic()
        if self.lost is not None:
            raise self.lost

    def beat(self, in_flight: tuple[InFlight, ...] = (), *, released: bool = False) -> None:
        """Say that the holder is alive, or that it lets go."""
        self._count += 1
        beat = Beat(epoch=self.epoch, count=self._count, at=datetime.now(UTC), released=released, in_flight=in_flight)
        self.journal.store.overwrite(beat_name(self.journal.run_id, self.epoch), beat.model_dump_json().encode())

    def release(self) -> None:
        """Let the run go, so that the next executor need not wait for the lapse. Without effect on a lease that was lost."""
        if self.lost is None:
            try:
                self.beat(released=True)
            except StoreUnavailable:
                pass  # it lapses by itself


def take_lease(
    journal: Journal,
    *,
    purpose: str,
    lapse_seconds: float = LAPSE_SECONDS,
    takeover: bool = False,
    wait: bool = False,
    on_wait: Callable[[Lease, float], None] | None = None,
    watched: tuple[int, int] | None = None,
) -> HeldLease:
    """Take the next epoch of a run.

    Args:
        journal: Of the run.
        purpose: Why, for whoever reads the leases: run, resume, settle.
        lapse_seconds: After how long without a beat others may take this lease over.
        takeover: Take it even from a holder that is alive.
        wait: Watch a holder that may be dead until its lease has lapsed; else only one that is known to be gone is superseded.
        on_wait: Told the holder's lease and the seconds left, about once a second, while waiting.
        watched: An epoch and the count of its last beat (0 for none) that the caller has watched for the lapse time: superseded if it has
            not beaten since.

    Raises:
        RunIsLeased: If the holder is alive.
    """
    epoch = _newest_epoch(journal)
    if epoch and not takeover:
        _await_lapse(journal, epoch, wait, on_wait, watched)
    lease = Lease(
        nonce=new_nonce(), run_id=journal.run_id, epoch=epoch + 1, holder=this_process(), purpose=purpose,
        lapse_seconds=lapse_seconds, taken_at=datetime.now(UTC),
    )  # fmt: skip
    name = lease_name(journal.run_id, epoch + 1)
    theirs = journal.store.create(name, seal(lease))
    if theirs is not None:
        winner = unseal(Lease, theirs, name)
        raise RunIsLeased(
            journal.run_id, winner.epoch, str(winner.holder), winner.taken_at + timedelta(seconds=winner.lapse_seconds)
        )
    return HeldLease(journal, lease)


def _newest_epoch(journal: Journal) -> int:
    folder = run_folder(journal.run_id) + "lease/"
    epochs = [int(n[len(folder) :].removesuffix(".json")) for n in journal.store.list(folder) if n.endswith(".json")]
    return max(epochs, default=0)


def _await_lapse(
    journal: Journal,
    epoch: int,
    wait: bool,
    on_wait: Callable[[Lease, float], None] | None,
    watched: tuple[int, int] | None,
) -> None:
    lease = journal.lease(epoch)
    if lease is None:
        return
    beat = journal.beat(epoch)
    if watched == (epoch, beat.count if beat else 0):
        return
    seen_at = time.monotonic()
    while not ((beat and beat.released) or is_gone(lease.holder)):
        left = lease.lapse_seconds - (time.monotonic() - seen_at)
        if left <= 0:
            return
        if not wait:
            raise _leased(journal, lease, beat)
        if on_wait:
            on_wait(lease, left)
        time.sleep(min(1.0, left, lease.lapse_seconds / 10))
        latest = journal.beat(epoch)
        if latest != beat:
            if latest is None or not latest.released:
                raise _leased(journal, lease, latest)  # it lives
            beat = latest


def _leased(journal: Journal, lease: Lease, beat: Beat | None) -> RunIsLeased:
    until = (beat.at if beat else lease.taken_at) + timedelta(seconds=lease.lapse_seconds)
    return RunIsLeased(journal.run_id, lease.epoch, str(lease.holder), until)
