"""What the steps of the audit return: plain, validated values, which is all that a journal needs."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel

Verdict = Literal["allowed", "review", "denied"]
Confidence = Literal["high", "medium", "low"]
UNKNOWN = "NOASSERTION"  # SPDX for "nobody can tell"


class Installed(BaseModel):
    """A distribution, and the folder that it is installed in."""

    name: str
    folder: str


class Metadata(BaseModel):
    """What a distribution says about its licence."""

    name: str
    version: str
    expression: str | None = None  # License-Expression, SPDX
    licence_field: str | None = None  # License, free text
    classifiers: list[str] = []  # the last part of each `License ::` classifier


class LicenceText(BaseModel):
    """A licence file that a distribution ships."""

    file: str
    text: str


class FoundLicence(BaseModel):
    """What one licence file is, with the words that show it."""

    file: str
    licence: str
    evidence: str = ""


class Classification(BaseModel):
    """The model's answer to: under which licence is this distribution?"""

    expression: str  # SPDX
    confidence: Confidence
    found: list[FoundLicence] = []
    rationale: str = ""


class Discrepancy(BaseModel):
    """Two sources that tell the licence differently, or a source that is missing."""

    kind: Literal["contradiction", "undeclared", "no text", "no declaration"]
    message: str


class PackageAudit(BaseModel):
    """Everything the audit knows of one distribution."""

    metadata: Metadata
    classification: Classification
    discrepancies: list[Discrepancy]


class Rule(BaseModel):
    """A list of the policy."""

    reason: str
    licences: list[str]


class Policy(BaseModel):
    """The policy file."""

    allowed: Rule
    review: Rule
    denied: Rule
    unknown_verdict: Verdict
    unknown_reason: str


class Conflict(BaseModel):
    """A distribution that somebody must decide about."""

    name: str
    version: str
    expression: str
    verdict: Verdict
    licence: str  # the part of the expression that decides the verdict
    reason: str
    discrepancies: list[Discrepancy] = []


class Judgement(BaseModel):
    """The model's answer to: what should we do about this conflict?"""

    decision: Literal["accept", "ask a person", "replace"]
    rationale: str


class Judged(BaseModel):
    """A conflict with its judgement."""

    conflict: Conflict
    judgement: Judgement


class Report(BaseModel):
    """The report, as `report.json` holds it."""

    written_at: datetime
    model: str
    distributions: int
    licences: dict[str, int]  # expression -> how many distributions
    verdicts: dict[Verdict, int]
    conflicts: list[Judged]
    packages: list[PackageAudit]


class ReportFiles(BaseModel):
    """Where the report is, and its first facts."""

    markdown: str
    json_file: str
    distributions: int
    verdicts: dict[Verdict, int]
    model: str
