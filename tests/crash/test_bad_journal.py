"""A journal that was damaged, and a store that fails: a clear error, and nothing lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.verify import verify
from tests.crash.harness import Case


@pytest.fixture
def killed(new_case: Callable[..., Case]) -> Case:
    """A run that was killed with some steps finished, on the local store."""
    whole = new_case()
    operations = whole.start("run", flow="catching", at=10**9, when="before")
    operations.wait()
    records = [at for at, operation in enumerate(operations.operations, 1) if "create" in operation and "/steps/" in operation]
    case = new_case()
    case.start("run", flow="catching", at=records[1], when="after").wait()
    assert case.run is not None and len(case.recorded()) >= 1
    return case


def files(case: Case, folder: str) -> list[Path]:
    return sorted((Path(case.store.uri) / "kitaru" / str(case.run) / folder).glob("*.json"))


def damage_and_resume(case: Case, damage: Callable[[Path], None], folder: str = "steps") -> dict:  # type: ignore[type-arg]
    target = files(case, folder)[0]
    whole, before = target.read_bytes(), {p: p.read_bytes() for p in files(case, "steps")}
    damage(target)
    answer = case.start("resume", run=case.run).answer
    assert {p: p.read_bytes() for p in files(case, "steps") if p != target} == {p: b for p, b in before.items() if p != target}
    target.write_bytes(whole)
    mended = case.start("resume", run=case.run).answer
    assert mended.get("status") == "completed" and not mended["problems"], mended
    return answer


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes().replace(b"before", b"befort").replace(b"coal", b"cool")),
        lambda path: path.write_bytes(b'{"sha256":"' + b"0" * 64 + b'","body":{}}'),
    ],
    ids=["torn", "empty", "edited", "not a record"],
)
def test_a_damaged_record_stops_the_resume_and_is_named(killed: Case, damage: Callable[[Path], None]) -> None:
    answer = damage_and_resume(killed, damage)
    assert answer["error"] == "CorruptRecord" and files(killed, "steps")[0].name in answer["message"]


def test_the_record_of_another_step_under_a_name_is_refused(killed: Case) -> None:
    other = files(killed, "steps")[-1].read_bytes()
    answer = damage_and_resume(killed, lambda path: path.write_bytes(other))
    assert answer["error"] == "CorruptRecord" and "another step" in answer["message"]


def test_a_deleted_event_is_missed(new_case: Callable[..., Case]) -> None:
    case = new_case()
    case.start("run", flow="failing_once").wait()
    case.start("resume", run=case.run).wait()
    events = files(case, "events")
    assert len(events) >= 3
    saved = events[1].read_bytes()
    events[1].unlink()
    answer = case.start("resume", run=case.run).answer
    assert answer["error"] == "JournalGap" and "number 2" in answer["message"]
    assert not verify(Journal(case.store, str(case.run))).ok
    events[1].write_bytes(saved)
    case.effects.with_suffix(".mended").touch()
    assert case.start("resume", run=case.run).answer["status"] == "completed"


def test_verify_sees_what_was_changed_and_what_was_lost(new_case: Callable[..., Case]) -> None:
    case = new_case()
    assert case.start("run", flow="sequential").answer["status"] == "completed"
    journal = Journal(case.store, str(case.run))
    assert verify(journal).ok
    first, second = files(case, "steps")[:2]
    whole = first.read_bytes(), second.read_bytes()
    first.unlink()
    assert any("is lost" in problem for problem in verify(journal).problems)
    first.write_bytes(whole[0])
    import hashlib

    body = whole[1][len('{"sha256":"') + 64 + len('","body":') : -1].replace(b'"epoch":1', b'"epoch":7')
    second.write_bytes(b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'","body":' + body + b"}")
    assert any("was changed" in problem for problem in verify(journal).problems), "an edit with a matching hash of its own"
    second.write_bytes(whole[1])
    assert verify(journal).ok


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=300k tmpfs {folder} 2>/dev/null"):
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    os.system(f"umount {folder}")


def test_a_full_disk_stops_the_run_and_loses_nothing(small_disk: Path, new_case: Callable[..., Case]) -> None:
    case = new_case()
    root = Path(case.store.uri) / "kitaru"
    saved = root.rename(root.with_name("kitaru-saved")) if root.exists() else None
    root.symlink_to(small_disk)
    try:
        answer = case.start("run", flow="sequential", inputs={"steps": 400}).answer
        assert answer["error"] == "StoreFull" and "resume" in answer["message"], answer
        stored, effects = case.recorded(), len(case.effect_lines())
        assert stored
        os.system(f"mount -o remount,size=20m {small_disk}")
        again = case.start("resume", run=case.run).answer
        assert again["status"] == "completed" and not again["problems"], again
        assert not [line for line in case.effect_lines()[effects:] if line[0] in stored], "a finished step ran again"
    finally:
        root.unlink()
        if saved is not None:
            saved.rename(root)
