"""Reads the texts of installed packages: real input, from wherever this runs."""

from __future__ import annotations

import re
from email.message import Message
from importlib.metadata import distribution
from typing import cast

from examples.compliance_agent.records import PackageText

_TELEMETRY = re.compile(r"[^.\n]*\b(?:telemetry|analytics|usage data|phone home)\b[^.\n]*", re.I)


def read(name: str) -> PackageText:
    """The texts of one package.

    Raises:
        PackageNotFoundError: If it is not installed.
    """
    found = distribution(name)
    about = cast(Message, found.metadata)
    classifiers = [c.rpartition("::")[2].strip() for c in about.get_all("Classifier") or [] if c.startswith("License")]
    licence = about.get("License-Expression") or ", ".join(classifiers) or (about.get("License") or "").splitlines()[:1]
    urls = " ".join(about.get_all("Project-URL") or []) + str(about.get("Home-page") or "")
    text = str(about.get_payload() or about.get("Description") or "")
    return PackageText(
        name=name,
        version=found.version,
        licence=licence if isinstance(licence, str) else "".join(licence),
        licence_files=[str(f) for f in found.files or [] if re.search(r"licen[sc]e|copying", f.name, re.I)][:5],
        has_contact=bool(re.search(r"issues|bug|github|gitlab|support", urls, re.I)),
        telemetry=[sentence.strip()[:200] for sentence in _TELEMETRY.findall(text)][:3],
    )


def findings(text: PackageText) -> list[str]:
    """What in a text the policy does not like."""
    found = []
    if not text.licence:
        found.append("names no licence")
    if not text.licence_files:
        found.append("brings no licence text")
    if not text.has_contact:
        found.append("names nowhere to report a problem")
    found += [f"speaks of data sent home: {sentence!r}" for sentence in text.telemetry]
    return found
