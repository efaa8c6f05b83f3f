"""The scripted model: rules instead of a language model, so that the example runs anywhere, offline and the same each time.

It really reads the licence texts. It answers as a model does: after a moment, with tokens counted, and with a rationale.
"""

from __future__ import annotations

import os
import re
import time

from examples.license_audit import spdx
from examples.license_audit.records import (
    UNKNOWN,
    Classification,
    Confidence,
    Conflict,
    FoundLicence,
    Judgement,
    LicenceText,
    Metadata,
)

NAME = "scripted model (rules, no LLM)"
LATENCY = float(os.environ.get("LICENSE_AUDIT_LATENCY", "0.05"))  # seconds that an answer takes

_MIT = r"permission is hereby granted, free of charge, to any person obtaining a copy"
_BSD = r"redistribution and use in source and binary forms"
_ISC = r"permission to use, copy, modify, and/?(?: ?or)? distribute this software for any purpose with or without fee"
_SIGNS = (  # words that only this licence has -> identifier; all that fit count
    (r"apache license,? version 2\.0", "Apache-2.0"),
    (r"mozilla public license,? (?:version|v\.) 2\.0", "MPL-2.0"),
    (r"python software foundation license version 2", "PSF-2.0"),
    (r"cnri license agreement|cnri grants licensee|1\.6b1 .{0,80}cnri", "CNRI-Python"),
    (r"gnu affero general public license version 3, 19 november 2007", "AGPL-3.0-or-later"),
    (r"gnu lesser general public license version 3, 29 june 2007", "LGPL-3.0-or-later"),
    (r"gnu lesser general public license version 2\.1, february 1999", "LGPL-2.1-or-later"),
    (r"gnu general public license version 2, june 1991", "GPL-2.0-or-later"),
    (r"boost software license - version 1\.0", "BSL-1.0"),
    (r"cc0 1\.0 universal", "CC0-1.0"),
    (r"this is free and unencumbered software released into the public domain", "Unlicense"),
    (r"altered source versions must be plainly marked as such", "Zlib"),
    (r"eclipse public license - v 2\.0", "EPL-2.0"),
    (r"server side public license", "SSPL-1.0"),
    (r"business source license 1\.1", "BUSL-1.1"),
    (r"no part of .{0,60} may be reproduced|proprietary and confidential", "LicenseRef-Proprietary"),
)


def classify(metadata: Metadata, texts: list[LicenceText]) -> Classification:
    """Under which licence a distribution is: what its texts say, and what it declares where they are silent."""
    time.sleep(LATENCY)
    found = [licence for text in texts for licence in licences_in(text)]
    names = list(dict.fromkeys(licence.licence for licence in found))
    declared, source = declaration(metadata)
    stated = spdx.identifiers(declared) if declared else []
    if not names:
        if not declared:
            return Classification(expression=UNKNOWN, confidence="low", rationale="No declaration and no text I can read.")
        return Classification(
            expression=declared,
            confidence="medium",
            rationale=f"Declared by the {source}; no licence text I can read is shipped.",
        )
    bsd = next((name for name in names if "BSD" in name and name != "0BSD"), None)
    if declared and bsd and spdx.ANY_BSD in stated:  # "BSD" says not which: the text does
        declared, stated = declared.replace(spdx.ANY_BSD, bsd), [bsd if name == spdx.ANY_BSD else name for name in stated]
    missing = [name for name in stated if name not in names]
    extra = [name for name in names if name not in stated]
    confidence: Confidence = "medium" if missing else "high"
    if not declared:
        expression, confidence = spdx.both(names), "medium"
        why = "By the texts alone: the metadata declare nothing."
    elif missing and len(missing) == len(stated):
        expression, confidence = spdx.both(names), "low"
        why = f"Declared by the {source} is {declared}, but the texts are {', '.join(names)}. The text is what was granted."
    else:
        expression = spdx.both([declared, *extra])
        why = f"Declared by the {source}, shown by the texts."
        if missing:
            why = f"Declared by the {source}; no text shows {', '.join(missing)}."
        if extra:
            why += f" Beside what is declared, the texts hold {', '.join(extra)}."
    return Classification(expression=expression, confidence=confidence, found=found, rationale=why)


def declaration(metadata: Metadata) -> tuple[str | None, str]:
    """What the metadata declare as an expression, and where: the first of expression, classifiers and licence field that says it."""
    if expression := spdx.as_expression(metadata.expression):
        return expression, "licence expression"
    by_field = spdx.meaning(metadata.licence_field or "")
    by_classifier = list(dict.fromkeys(name for c in metadata.classifiers for name in spdx.meaning(c)))
    if by_classifier == [spdx.ANY_BSD] and by_field and "BSD" in by_field[0]:
        by_classifier = []  # the field is the more exact
    if by_classifier:
        return " OR ".join(by_classifier), "classifiers"  # several classifiers: a choice, by custom
    return (" OR ".join(by_field), "licence field") if by_field else (None, "")


def licences_in(text: LicenceText) -> list[FoundLicence]:
    """Every licence whose words stand in a text."""
    flat = re.sub(r"[\s*#>\"'`]+", " ", text.text.lower())
    found: dict[str, str] = {}

    def note(name: str, match: re.Match[str]) -> None:
        found.setdefault(name, flat[match.start() : match.end() + 40].strip()[:160])

    for pattern, name in _SIGNS:
        if match := re.search(pattern, flat):
            note(name, match)
    if match := re.search(r"gnu general public license version 3, 29 june 2007|gpl-3\.0-(?:only|or-later)", flat):
        with_exception = "gcc runtime library exception" in flat or "gcc-exception-3.1" in flat
        note("GPL-3.0-or-later WITH GCC-exception-3.1" if with_exception else "GPL-3.0-or-later", match)
    for match in re.finditer(_MIT, flat):
        note("MIT" if "this permission notice" in flat[match.start() : match.start() + 900] else "MIT-0", match)
    for match in re.finditer(_BSD, flat):
        note(_which_bsd(flat[match.start() : match.start() + 1200]), match)
    for match in re.finditer(_ISC, flat):
        note("ISC" if "appear in all copies" in flat[match.start() : match.start() + 400] else "0BSD", match)
    if "PSF-2.0" in found:  # its text tells Python's whole history, with the licences of then
        found.pop("CNRI-Python", None)
        found.pop("0BSD", None)
    return [FoundLicence(file=text.file, licence=name, evidence=words) for name, words in found.items()]


def _which_bsd(clauses: str) -> str:
    if "advertising materials mentioning features" in clauses:
        return "BSD-4-Clause"
    return "BSD-3-Clause" if re.search(r"endorse or promote", clauses) else "BSD-2-Clause"


def judge(conflict: Conflict) -> Judgement:
    """What to do about a conflict."""
    time.sleep(LATENCY)
    name, licence = conflict.name, conflict.licence
    if conflict.verdict == "denied":
        return Judgement(
            decision="replace",
            rationale=f"{licence} would reach the whole work that ships {name}. Use another library, or keep it out of what is "
            "distributed.",
        )
    if "GCC-exception" in licence:
        return Judgement(
            decision="accept",
            rationale=f"The GPL part of {name} is GCC's runtime library, and its exception allows to ship it with a work under any "
            "licence.",
        )
    if licence.startswith(("MPL", "LGPL", "EPL")):
        return Judgement(
            decision="accept",
            rationale=f"{licence} reaches only its own files or library, and {name} is used unchanged: keeping the notice is enough. "
            "Whoever changes it must publish the change.",
        )
    for discrepancy in conflict.discrepancies:
        if discrepancy.kind == "contradiction":
            return Judgement(
                decision="ask a person", rationale=f"{discrepancy.message} The authors of {name} must say which one they mean."
            )
    return Judgement(decision="ask a person", rationale=f"{conflict.reason}. Find out which licence {name} is really under.")
