"""The agent's tools: read what is installed, compare, and write the report. Plain functions, free of the runtime."""

from __future__ import annotations

import os
import sysconfig
import tomllib
from collections import Counter
from datetime import datetime
from fnmatch import fnmatchcase
from importlib import metadata as installed
from pathlib import Path

from examples.license_audit import spdx
from examples.license_audit.records import (
    UNKNOWN,
    Classification,
    Conflict,
    Discrepancy,
    Installed,
    Judged,
    LicenceText,
    Metadata,
    PackageAudit,
    Policy,
    Report,
    ReportFiles,
    Verdict,
)

_TEXT_NAMES = ("LICENSE", "LICENCE", "COPYING", "UNLICENSE")
_NOT_TEXTS = {".py", ".pyi", ".pyc", ".so", ".json", ".toml", ".html"}
_SEVERITY: list[Verdict] = ["allowed", "review", "denied"]


def list_distributions(environment: str | None, only: list[str] | None) -> list[Installed]:
    """The distributions of an environment, sorted by name, each once.

    Args:
        environment: Its `site-packages`; those of this Python by default. Not all of `sys.path`: setuptools, once imported, puts what
            it vendors there.
        only: Names to take; all by default.
    """
    folders = [environment] if environment else [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found: dict[str, Installed] = {}
    for folder in dict.fromkeys(folders):
        for distribution in installed.distributions(path=[folder]):
            if name := distribution.metadata["Name"]:
                found.setdefault(name, Installed(name=name, folder=folder))
    if only is not None and (unknown := set(only) - found.keys()):
        raise ValueError(f"not installed here: {', '.join(sorted(unknown))}")
    return [found[name] for name in sorted(found if only is None else set(only), key=str.lower)]


def read_metadata(one: Installed) -> Metadata:
    """What a distribution says about its licence."""
    found = _open(one)
    fields = found.metadata.json
    classifiers = [c for c in fields.get("classifier", []) if c.startswith("License ::")]
    return Metadata(
        name=str(fields["name"]),
        version=found.version,
        expression=_text(fields.get("license_expression")),
        licence_field=_text(fields.get("license")),
        classifiers=[c.rsplit("::", 1)[-1].strip() for c in classifiers],
    )


def _open(one: Installed) -> installed.Distribution:
    return next(iter(installed.distributions(name=one.name, path=[one.folder])))


def _text(field: object) -> str | None:
    return str(field or "").strip()[:500] or None


def read_licence_files(one: Installed) -> list[LicenceText]:
    """The licence files that a distribution ships, those of what it bundles too."""
    found = [
        file for file in _open(one).files or [] if file.name.upper().startswith(_TEXT_NAMES) and file.suffix not in _NOT_TEXTS
    ]
    return [
        LicenceText(file=str(file), text=path.read_text(errors="replace"))
        for file in sorted(found)
        if (path := Path(os.fspath(file.locate()))).is_file()
    ]


def read_policy(path: str) -> Policy:
    """The policy file."""
    content = tomllib.loads(Path(path).read_text())
    unknown = content.pop("unknown")
    return Policy(**content, unknown_verdict=unknown["verdict"], unknown_reason=unknown["reason"])


# --- comparing -----------------------------------------------------------------------------------------------------------


def cross_check(metadata: Metadata, classification: Classification) -> list[Discrepancy]:
    """What expression, licence field, classifiers and texts of a distribution tell differently."""
    expression = spdx.as_expression(metadata.expression)
    in_texts = list(dict.fromkeys(found.licence for found in classification.found))
    by_source = {
        "The licence expression": spdx.identifiers(expression) if expression else [],
        "The licence field": spdx.meaning(metadata.licence_field or ""),
        "The classifiers": [name for c in metadata.classifiers for name in spdx.meaning(c)],
    }
    declared = list(dict.fromkeys(name for names in by_source.values() for name in names))
    found: list[Discrepancy] = []

    def add(kind: str, message: str) -> None:
        found.append(Discrepancy(kind=kind, message=message))  # type: ignore[arg-type]

    if not declared:
        add("no declaration", "The metadata declare no licence.")
    if not in_texts:
        add("no text", "No licence text is shipped, or none that could be read.")
        return found
    for source, names in by_source.items():
        if names and not any(spdx.fits(name, text) for name in names for text in in_texts):
            add("contradiction", f"{source} says {', '.join(names)}, the texts are {', '.join(in_texts)}.")
    for name in in_texts:
        if declared and not any(spdx.fits(name, stated) for stated in declared):
            where = next(f.file for f in classification.found if f.licence == name)
            add("undeclared", f"{where} holds {name}, which the metadata do not declare.")
    return found


def verdict_on(expression: str, policy: Policy) -> tuple[Verdict, str, str]:
    """What the policy says about an expression, the licence that decides, and why: the better of `A OR B`, the worse of `A AND B`."""

    def one(name: str) -> tuple[int, str, str]:
        lists = (policy.allowed, policy.review, policy.denied)
        exact = [at for at, rule in enumerate(lists) if name in rule.licences]
        by_pattern = [at for at, rule in enumerate(lists) if any(fnmatchcase(name, entry) for entry in rule.licences)]
        for at in (*exact, *reversed(by_pattern)):  # the exact entry first, then the strictest pattern
            return at, name, lists[at].reason
        return _SEVERITY.index(policy.unknown_verdict), name, policy.unknown_reason

    try:
        severity, licence, reason = spdx.evaluate(expression, one, _mildest, _strictest)
    except ValueError as error:
        severity, licence, reason = _SEVERITY.index(policy.unknown_verdict), expression, str(error)
    return _SEVERITY[severity], licence, reason


def _mildest(verdicts: list[tuple[int, str, str]]) -> tuple[int, str, str]:
    return min(verdicts, key=lambda verdict: verdict[0])


def _strictest(verdicts: list[tuple[int, str, str]]) -> tuple[int, str, str]:
    return max(verdicts, key=lambda verdict: verdict[0])


def find_conflicts(audits: list[PackageAudit], policy: Policy) -> list[Conflict]:
    """The distributions that the policy does not simply allow, or whose sources contradict each other."""
    conflicts = []
    for audit in audits:
        expression = audit.classification.expression
        verdict, licence, reason = verdict_on(expression, policy)
        if verdict != "allowed" or any(d.kind == "contradiction" for d in audit.discrepancies):
            conflicts.append(
                Conflict(
                    name=audit.metadata.name, version=audit.metadata.version, expression=expression, verdict=verdict,
                    licence=licence, reason=reason, discrepancies=audit.discrepancies,
                )
            )  # fmt: skip
    return conflicts


# --- the report ----------------------------------------------------------------------------------------------------------


def write_report(folder: str, audits: list[PackageAudit], judged: list[Judged], model: str, at: datetime) -> ReportFiles:
    """Write `report.md` and `report.json`."""
    verdicts: Counter[Verdict] = Counter(j.conflict.verdict for j in judged)
    verdicts["allowed"] += len(audits) - len(judged)
    report = Report(
        written_at=at, model=model, distributions=len(audits), conflicts=judged, packages=audits,
        licences=dict(Counter(a.classification.expression for a in audits).most_common()),
        verdicts={verdict: verdicts[verdict] for verdict in _SEVERITY},
    )  # fmt: skip
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    markdown, json_file = place / "report.md", place / "report.json"
    markdown.write_text(_markdown(report))
    json_file.write_text(report.model_dump_json(indent=2))
    return ReportFiles(
        markdown=str(markdown), json_file=str(json_file), distributions=len(audits), verdicts=report.verdicts, model=model
    )


def _markdown(report: Report) -> str:
    counts = ", ".join(f"{n} {verdict}" for verdict, n in report.verdicts.items())
    lines = [
        "# Licence audit",
        "",
        f"{report.distributions} distributions: {counts}. {report.written_at:%Y-%m-%d %H:%M} UTC, by {report.model}.",
        "",
        "## To decide",
        "",
        "| distribution | licence | policy | because | judgement | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for verdict in reversed(_SEVERITY):
        for one in report.conflicts:
            c, j = one.conflict, one.judgement
            if c.verdict == verdict:
                row = [f"{c.name} {c.version}", c.expression, verdict, c.licence, f"**{j.decision}**", _cell(j.rationale)]
                lines.append(f"| {' | '.join(row)} |")
    lines += ["", "## Licences", "", "| licence | distributions |", "| --- | --- |"]
    lines += [f"| {name} | {n} |" for name, n in report.licences.items()]
    lines += ["", "## Metadata that do not match the texts", ""]
    lines += [f"- {a.metadata.name}: {_cell(d.message)}" for a in report.packages for d in a.discrepancies]
    lines += ["", "## Distributions", "", "| distribution | licence | confidence | why |", "| --- | --- | --- | --- |"]
    for audit in report.packages:
        m, c2 = audit.metadata, audit.classification
        shown = "unknown" if c2.expression == UNKNOWN else c2.expression
        lines.append(f"| {m.name} {m.version} | {shown} | {c2.confidence} | {_cell(c2.rationale)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
