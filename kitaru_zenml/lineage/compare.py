"""Where the journal and ZenML tell different stories of a run; for `kitaru verify`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from zenml.enums import ExecutionStatus
from zenml.models import StepRunResponse

from kitaru_zenml.journal.records import MaterializedValue, StepRecord, artifact_folder
from kitaru_zenml.lineage.registration import mark_of
from kitaru_zenml.lineage.translate import output_name

_AS_COMPLETED = {ExecutionStatus.COMPLETED, ExecutionStatus.CACHED}
_AS_FAILED = {ExecutionStatus.FAILED, ExecutionStatus.RETRYING, ExecutionStatus.RETRIED}


def compare(
    records: Mapping[str, StepRecord],
    step_runs: Iterable[StepRunResponse],
    reused: Collection[str] = (),
    not_asked_for: Collection[str] = (),
) -> list[str]:
    """The differences between a run's journal and its step runs in ZenML, as sentences; empty if they agree.

    Args:
        records: All records of the run by key, of every generation.
        step_runs: All step runs of the run, hydrated, with every version.
        reused: Of a fork: the keys of the records that another run holds.
        not_asked_for: Those of them, and overrides, that no call took or is known to have taken: ZenML need not show them.
    """
    ends: dict[str, list[StepRunResponse]] = defaultdict(list)
    natives: dict[str, StepRunResponse] = {}
    attempts: dict[str, int] = defaultdict(int)
    for step in step_runs:
        mark = mark_of(step)
        if mark is None:
            natives[str(step.id)] = step
        elif "attempt" in mark:
            attempts[mark["key"]] += 1
        else:
            ends[mark["key"]].append(step)

    differences: list[str] = []
    for key, record in sorted(records.items(), key=lambda item: item[1].number):
        if not record.is_shown:
            continue
        if record.step_run is not None and key not in reused:
            if natives.pop(record.step_run, None) is None:
                differences.append(f"`{record.display}` ran as ZenML step run {record.step_run}, which ZenML does not have.")
            continue
        found = ends.pop(key, [])
        if not found and key in not_asked_for:
            continue
        if not found:
            differences.append(f"`{record.display}` is in the journal and not in ZenML.")
        elif len(found) > 1:
            names = ", ".join(f"`{step.name}` version {step.version}" for step in found)
            differences.append(f"`{record.display}` is in ZenML {len(found)} times: {names}.")
        else:
            differences += _differences(key, record, found[0])
            if key in reused and record.failure is None and found[0].status != ExecutionStatus.CACHED:
                differences.append(f"`{record.display}` is reused from run {record.run_id}, and not shown as cached in ZenML.")
            if attempts[key] != len(record.attempts) and key not in reused:
                differences.append(
                    f"`{record.display}` was retried {len(record.attempts)} times, of which ZenML has {attempts[key]}."
                )
    differences += [
        f"`{step.name}` version {step.version} is in ZenML and not in the journal." for steps in ends.values() for step in steps
    ]
    differences += [f"`{step.name}` is in ZenML, and no record of the journal says so." for step in natives.values()]
    return differences


def _differences(key: str, record: StepRecord, step: StepRunResponse) -> list[str]:
    differences = []
    if step.status not in (_AS_COMPLETED if record.failure is None else _AS_FAILED):
        is_so = "completed" if record.failure is None else "failed"
        differences.append(f"`{record.display}` {is_so} by the journal, and is {step.status.value} in ZenML.")
    versions = step.outputs.get(output_name(record), [])
    value = record.outcome
    folder = value.folder if isinstance(value, MaterializedValue) else artifact_folder(record.run_id, key)
    if record.step_run is not None:
        return differences  # a native step's artifact lies where ZenML put it
    if not versions:
        differences.append(f"`{record.display}` has no artifact version of its {output_name(record)} in ZenML.")
    elif not versions[0].uri.endswith(f"/{folder}"):
        uri = versions[0].uri
        differences.append(f"The artifact version of `{record.display}` points at {uri}, not at its record's {folder}.")
    return differences
