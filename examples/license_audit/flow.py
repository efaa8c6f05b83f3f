"""The agent: audit the licence of every distribution that is installed in this environment.

Every model call and every tool call is a durable step. Kill the process whenever you like: `kitaru resume RUN` goes on, and no
finished call is made again. Nothing here knows about that, except for the decorators.
"""

from __future__ import annotations

from datetime import datetime

from examples.license_audit import tools
from examples.license_audit.calls import log_call
from examples.license_audit.model import ModelUnavailable, model_named
from examples.license_audit.records import (
    Classification,
    Conflict,
    Discrepancy,
    Installed,
    Judged,
    Judgement,
    LicenceText,
    Metadata,
    PackageAudit,
    Policy,
    ReportFiles,
)
from kitaru_zenml import checkpoint, current_step, flow, now

# --- tools ---------------------------------------------------------------------------------------------------------------


@checkpoint
def list_distributions(environment: str | None, only: list[str] | None) -> list[Installed]:
    """The installed distributions."""
    log_call(environment or "this environment")
    return tools.list_distributions(environment, only)


@checkpoint
def read_policy(path: str) -> Policy:
    """The policy, as it is now: a resumed audit goes on with the one it began with."""
    log_call(path)
    return tools.read_policy(path)


@checkpoint
def read_metadata(one: Installed) -> Metadata:
    """What a distribution says about its licence."""
    log_call(one.name)
    return tools.read_metadata(one)


@checkpoint
def read_licence_files(one: Installed) -> list[LicenceText]:
    """The licence files that a distribution ships."""
    log_call(one.name)
    return tools.read_licence_files(one)


@checkpoint
def cross_check(metadata: Metadata, classification: Classification) -> list[Discrepancy]:
    """What metadata, classifiers and texts tell differently."""
    log_call(metadata.name)
    return tools.cross_check(metadata, classification)


@checkpoint
def find_conflicts(audits: list[PackageAudit], policy: Policy) -> list[Conflict]:
    """The distributions that the policy does not simply allow."""
    log_call(f"{len(audits)} distributions")
    return tools.find_conflicts(audits, policy)


@checkpoint
def write_report(folder: str, audits: list[PackageAudit], judged: list[Judged], model: str, date: datetime) -> ReportFiles:
    """Write the report; done twice, it writes the same."""
    log_call(folder)
    return tools.write_report(folder, audits, judged, model, date)


# --- model ---------------------------------------------------------------------------------------------------------------


@checkpoint(retries=3, retry_delay=1, retry_on=ModelUnavailable, timeout=120)
def classify(metadata: Metadata, texts: list[LicenceText], model: str) -> Classification:
    """Ask the model under which licence a distribution is."""
    log_call(metadata.name)
    answer, usage = model_named(model).classify(metadata, texts)
    current_step().log_usage(usage.model, usage.input_tokens, usage.output_tokens, usage.cost)
    return answer


@checkpoint(retries=3, retry_delay=1, retry_on=ModelUnavailable, timeout=120)
def judge(conflict: Conflict, model: str) -> Judgement:
    """Ask the model what to do about a conflict."""
    log_call(conflict.name)
    answer, usage = model_named(model).judge(conflict)
    current_step().log_usage(usage.model, usage.input_tokens, usage.output_tokens, usage.cost)
    return answer


# --- the agent -----------------------------------------------------------------------------------------------------------


@checkpoint
def audit_package(one: Installed, model: str) -> PackageAudit:
    """One distribution: read, classify, cross-check. A step that is made of steps."""
    metadata = read_metadata(one)
    classification = classify(metadata, read_licence_files(one), model)
    return PackageAudit(metadata=metadata, classification=classification, discrepancies=cross_check(metadata, classification))


@flow(max_workers=8)
def license_audit(
    model: str, policy: str, report_folder: str, environment: str | None = None, only: list[str] | None = None
) -> ReportFiles:
    """Audit the licences of the installed distributions.

    Args:
        model: Name of the model, see `model.chosen_model`.
        policy: Path of the policy file.
        report_folder: Where the report goes.
        environment: The `site-packages` to audit; this Python's own by default.
        only: Names of the distributions to audit; all by default.
    """
    rules = read_policy(policy)
    audits = [done.result() for done in audit_package.map(list_distributions(environment, only), model=model)]
    conflicts = find_conflicts(audits, rules)
    judgements = [done.result() for done in judge.map(conflicts, model=model)]
    judged = [Judged(conflict=c, judgement=j) for c, j in zip(conflicts, judgements, strict=True)]
    return write_report(report_folder, audits, judged, model, now())
