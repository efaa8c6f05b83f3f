"""`verify` on journals of real runs, damaged in each way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kitaru_zenml.journal.journal import Journal, new_nonce
from kitaru_zenml.journal.local import LocalStore
from kitaru_zenml.journal.records import record_key, seal, step_name
from kitaru_zenml.journal.verify import verify
from kitaru_zenml.runs import find_run, open_journal
from tests.cli import flows_for_cli as flows


@pytest.fixture(scope="module")
def original() -> Journal:
    """A run that failed, was resumed and failed again: two closed legs; its values are blobs."""
    with pytest.raises(ValueError, match="refused") as failed:
        flows.refunding.with_options(inline_limit=0).run(7)
    run = str(failed.value.__notes__[0]).split()[1]
    with pytest.raises(ValueError, match="refused"):
        flows.refunding.resume(run)
    return open_journal(find_run(run))


@pytest.fixture
def journal(original: Journal, tmp_path: Path) -> Journal:
    """A copy of it to damage."""
    for name in original.store.list(f"kitaru/{original.run_id}/"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(original.store.uri) / name, tmp_path / name)
    return Journal(LocalStore(str(tmp_path)), original.run_id)


def paths(journal: Journal, kind: str) -> list[Path]:
    return sorted((Path(journal.store.uri) / "kitaru" / journal.run_id / kind).iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_whole_journal_is_whole(journal: Journal) -> None:
    found = verify(journal)
    assert found.ok and found.legs == 2 and found.records == found.covered == 3 and found.root
    assert verify(journal, found.root).notes == ()


@pytest.mark.parametrize("kind", ["steps", "events", "lease"])
def test_each_kind_of_object_with_a_flipped_bit_is_named_once(journal: Journal, kind: str) -> None:
    damaged = next(path for path in paths(journal, kind) if path.suffix == ".json")
    flip(damaged)
    named = [problem for problem in verify(journal).problems if damaged.name in problem]
    assert len(named) == 1 and "is corrupt" in named[0]


def test_a_changed_and_a_lost_blob_show(journal: Journal) -> None:
    blob = paths(journal, "blobs")[0]
    flip(blob)
    assert any(blob.name[:12] in p and "was changed" in p and "`read#0`" in p for p in verify(journal).problems)
    blob.unlink()
    assert any(blob.name[:12] in p and "missing" in p for p in verify(journal).problems)


def test_a_lost_lease_and_a_lost_event_show(journal: Journal) -> None:
    next(p for p in paths(journal, "lease") if p.suffix == ".json").unlink()
    assert "the lease of epoch 1 is lost" in verify(journal).problems
    paths(journal, "events")[1].unlink()
    assert any("misses number 2" in problem for problem in verify(journal).problems)


def test_a_lost_last_event_shows_against_the_root_in_zenml(journal: Journal) -> None:
    root = verify(journal).root
    paths(journal, "events")[-1].unlink()
    assert any("ZenML's run metadata holds a root that is not in the journal" in p for p in verify(journal, root).problems)


def test_a_root_that_zenml_does_not_have_yet_is_no_alarm(journal: Journal) -> None:
    closes = [event for event in journal.load().events if event.type == "leg_closed"]
    found = verify(journal, closes[0].root)
    assert found.ok and any("does not hold the last root yet" in note for note in found.notes)


def test_a_late_record_of_a_superseded_leg_is_no_alarm(journal: Journal) -> None:
    record = next(r for r in journal.load().records.values() if r.name == "read")
    late = record.model_copy(update={"path": "/read@late#.0", "nonce": new_nonce(), "epoch": 1})
    journal.store.create(step_name(journal.run_id, record_key(late.name, late.path, late.generation)), seal(late))
    found = verify(journal)
    assert found.ok and any("is late: leg 1" in note for note in found.notes)


def test_inputs_that_do_not_match_their_digest_show(journal: Journal) -> None:
    path = next(p for p in paths(journal, "steps") if p.name.startswith("read"))
    record = next(r for r in journal.load().records.values() if r.name == "read")
    path.write_bytes(seal(record.model_copy(update={"inputs": {"n": 99}})))  # with a hash that fits
    problems = verify(journal).problems
    assert any("was changed since its leg closed" in p for p in problems)
    assert any("do not match their digest in argument `n`" in p for p in problems)
