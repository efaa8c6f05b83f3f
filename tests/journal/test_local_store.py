"""The local store when the disk is full, closed or gone, and when its writer is killed."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kitaru_zenml.errors import BucketNotFound, StoreAccessDenied, StoreFull, StoreNotConditional, StoreUnavailable
from kitaru_zenml.journal import local
from kitaru_zenml.journal.local import LocalStore


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced, in order: `file` or `folder`."""
    seen: list[str] = []
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    return seen


def files(root: Path) -> list[str]:
    """Everything below a folder, temporary files too."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def failing(error: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return fail


def test_an_acknowledged_object_costs_one_file_sync_and_one_folder_sync(tmp_path: Path, syncs: list[str]) -> None:
    store = LocalStore(str(tmp_path))
    store.create("kitaru/r/steps/0", b"x")
    del syncs[:]
    store.create("kitaru/r/steps/1", b"x")
    assert syncs == ["file", "folder"]


def test_the_folders_on_the_way_are_synced_once_a_process_also_if_another_made_them(tmp_path: Path, syncs: list[str]) -> None:
    (tmp_path / "kitaru/r/steps").mkdir(parents=True)
    LocalStore(str(tmp_path)).create("kitaru/r/steps/1", b"x")
    assert syncs == ["folder", "folder", "folder", "file", "folder"]


def test_the_loser_syncs_the_folder_before_it_adopts_the_winners_object(tmp_path: Path, syncs: list[str]) -> None:
    store = LocalStore(str(tmp_path))
    store.create("kitaru/r/1", b"one")
    del syncs[:]
    assert store.create("kitaru/r/1", b"two") == b"one"
    assert syncs[-1] == "folder"


def test_what_a_resume_replays_is_durable(tmp_path: Path, syncs: list[str]) -> None:
    store = LocalStore(str(tmp_path))
    store.create("kitaru/r/1", b"one")
    del syncs[:]
    store.get_many(["kitaru/r/1", "kitaru/r/2"])
    assert syncs == ["folder"]


def test_leftover_temporary_files_never_show(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.create("kitaru/r/1", b"x")
    (tmp_path / "kitaru/r" / f"{local._TEMPORARY}0123").write_bytes(b"half")
    assert store.list("kitaru/") == ["kitaru/r/1"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_nothing_half_written_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        store = LocalStore(str(disk))
        assert store.create("kitaru/r/1", b"x" * 100_000) is None
        with pytest.raises(StoreFull, match="No space left") as caught:
            store.create("kitaru/r/2", b"y" * 200_000)
        assert "kitaru resume" in str(caught.value)
        assert files(disk) == ["kitaru/r/1"]
        store.delete(["kitaru/r/1"])
        assert store.create("kitaru/r/2", b"y" * 200_000) is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_counts_as_full(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.create("kitaru/r/1", b"x")
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            store.create("kitaru/r/2", b"y" * 5000)
        except StoreFull:
            os._exit(42)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert files(tmp_path) == ["kitaru/r/1"]


@pytest.mark.parametrize(
    ("call", "error", "kind"),
    [
        ("fsync", errno.EDQUOT, StoreFull),
        ("fsync", errno.EIO, StoreUnavailable),
        ("link", errno.ENOSPC, StoreFull),
        ("link", errno.EACCES, StoreAccessDenied),
        ("link", errno.EPERM, StoreNotConditional),
        ("link", errno.EOPNOTSUPP, StoreNotConditional),
        ("open", errno.EROFS, StoreAccessDenied),
    ],
)
def test_each_refusal_of_the_disk_has_its_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int, kind: type[Exception]
) -> None:
    store = LocalStore(str(tmp_path))
    store.create("kitaru/r/1", b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(error))
        with pytest.raises(kind) as caught:
            store.create("kitaru/r/2", b"y")
    assert type(caught.value) is kind
    assert files(tmp_path) == ["kitaru/r/1"]
    assert store.create("kitaru/r/2", b"y") is None


def test_a_folder_that_may_only_be_read_is_said(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.create("kitaru/r/1", b"x")
    tmp_path.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        else:
            (tmp_path / "kitaru/r").chmod(0o555)
        try:
            store.create("kitaru/r/2", b"y")
        except StoreAccessDenied:
            os._exit(42)
        except BaseException:
            os._exit(2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


def test_a_missing_root_is_not_made(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "unmounted"))
    for action in (lambda: store.create("kitaru/r/1", b"x"), lambda: store.get("kitaru/r/1"), lambda: store.list("kitaru/")):
        with pytest.raises(BucketNotFound):
            action()
    assert not (tmp_path / "unmounted").exists()


def test_a_name_that_is_too_long_or_leaves_the_store_is_refused(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    for name in ("kitaru/" + "n" * 300, "kitaru/../../outside"):
        with pytest.raises(StoreUnavailable):
            store.create(name, b"x")
    assert files(tmp_path) == []


def test_a_folder_deleted_under_the_store_is_made_again(tmp_path: Path, syncs: list[str]) -> None:
    store = LocalStore(str(tmp_path))
    store.create("kitaru/r/steps/1", b"x")
    subprocess.run(["rm", "-r", str(tmp_path / "kitaru")], check=True)
    del syncs[:]
    assert store.create("kitaru/r/steps/2", b"y") is None
    assert store.list("kitaru/") == ["kitaru/r/steps/2"]
    assert syncs == ["folder", "folder", "folder", "file", "folder"]


def test_a_folder_that_vanishes_again_and_again_ends_the_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.ENOENT))
    with pytest.raises(StoreUnavailable, match="again and again"):
        LocalStore(str(tmp_path)).create("kitaru/r/1", b"x")


def test_async_creates_overlap_their_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path))
    store.create("kitaru/r/0", b"x")
    together = threading.Barrier(16, timeout=20)
    fsync, names = os.fsync, set()

    def meet(descriptor: int) -> None:
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            together.wait()  # broken, and so an error, unless all sixteen are in their file sync at once
            names.add(threading.current_thread().name.rpartition("_")[0])
        fsync(descriptor)

    async def creates() -> list[bytes | None]:
        return await asyncio.gather(*(store.create_async(f"kitaru/r/{i}", b"x") for i in range(1, 17)))

    monkeypatch.setattr(os, "fsync", meet)
    assert asyncio.run(creates()) == [None] * 16
    assert names == {"kitaru-store"}


def test_a_forked_process_has_store_threads_of_its_own(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    asyncio.run(store.create_async("kitaru/r/1", b"x"))
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        won = asyncio.run(store.create_async("kitaru/r/2", b"y")) is None
        os._exit(42 if won else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


WRITER = """
import sys
from kitaru_zenml.journal.local import LocalStore
store, n = LocalStore(sys.argv[1]), 0
while True:
    assert store.create(f"kitaru/r/{n:06d}", f"{n:06d}".encode() * 20_000) is None
    print(n, flush=True)
    n += 1
"""


def test_a_writer_killed_at_any_moment_leaves_whole_objects_and_all_that_it_acknowledged(tmp_path: Path) -> None:
    def kill_one(i: int) -> None:
        root = tmp_path / str(i)
        root.mkdir()
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.003 * i)
        writer.kill()
        acknowledged = [0, *(int(line) for line in writer.stdout.read().splitlines() if line)]
        writer.wait()
        store = LocalStore(str(root))
        for n, name in enumerate(store.list("kitaru/")):
            assert name == f"kitaru/r/{n:06d}" and store.get(name) == f"{n:06d}".encode() * 20_000
        assert len(store.list("kitaru/")) > max(acknowledged)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill_one, range(12)))
