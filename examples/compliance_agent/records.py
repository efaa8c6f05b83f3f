"""What tools and agents of the check return."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class PackageText(BaseModel):
    """What an installed package says of itself."""

    name: str
    version: str
    licence: str
    licence_files: list[str]
    has_contact: bool
    telemetry: list[str]  # sentences that speak of data that is sent home


class Verdict(BaseModel):
    """What the reviewer makes of a package's findings."""

    package: str
    severity: Literal["none", "minor", "severe"]
    because: str


class Entry(BaseModel):
    """A line of the report."""

    package: str
    state: Literal["passed", "noted", "waived", "refused"]
    because: str


class Report(BaseModel):
    """The report of a check."""

    entries: list[Entry]
    summary: str
