"""SPDX licence identifiers: what free text and classifiers mean, and what an expression is made of.

Just enough of SPDX for the audit: `AND`, `OR`, `WITH` and parentheses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
ANY_BSD = "LicenseRef-BSD"  # "BSD", without a word on which
_NAME = re.compile(r"[\w.+:-]+")
_TOKEN = re.compile(r"\(|\)|[^\s()]+")

_MEANINGS = (  # pattern over free text or a classifier -> identifier; the first that fits counts
    (r"affero", "AGPL-3.0-or-later"),
    (r"lesser general|\blgpl", "LGPL-3.0-or-later"),
    (r"general public license v2|gpl-?v?2\b|gplv2", "GPL-2.0-or-later"),
    (r"general public|\bgpl", "GPL-3.0-or-later"),
    (r"mozilla|\bmpl\b", "MPL-2.0"),
    (r"python software foundation|\bpsf", "PSF-2.0"),
    (r"apache", "Apache-2.0"),
    (r"mit[- ]0|no attribution", "MIT-0"),
    (r"\bmit\b", "MIT"),
    (r"bsd[- ]?3|3[- ]clause|new bsd|modified bsd", "BSD-3-Clause"),
    (r"bsd[- ]?2|2[- ]clause|simplified bsd", "BSD-2-Clause"),
    (r"0bsd|zero[- ]clause", "0BSD"),
    (r"\bbsd\b", ANY_BSD),
    (r"\bisc\b", "ISC"),
    (r"unlicense", "Unlicense"),
    (r"public domain|cc0", "CC0-1.0"),
    (r"zlib", "Zlib"),
    (r"proprietary", "LicenseRef-Proprietary"),
)


def meaning(text: str) -> list[str]:
    """The identifier that a classifier or a short free text means, if any; `MIT OR Apache-2.0` is taken as it is."""
    if re.fullmatch(r"[\w.+-]+(\s+(AND|OR|WITH)\s+[\w.+-]+)+", text.strip()):
        return identifiers(text)
    return next(([name] for pattern, name in _MEANINGS if re.search(pattern, text.lower())), [])


def as_expression(declared: str | None) -> str | None:
    """A declared expression as it is, or what it means if it is none; `None` if it means nothing."""
    try:
        identifiers(declared or "")
    except ValueError:
        return " OR ".join(meaning(declared or "")) or None
    return declared


def fits(one: str, other: str) -> bool:
    """Whether two identifiers may mean the same licence: "BSD" fits each BSD licence."""
    return one == other or (ANY_BSD in (one, other) and "BSD" in one and "BSD" in other)


def identifiers(expression: str) -> list[str]:
    """The licences of an expression, `A WITH B` as one, in their order and each once."""
    found: dict[str, None] = {}
    evaluate(expression, lambda name: found.setdefault(name), lambda _: None, lambda _: None)
    return list(found)


def both(names: Iterable[str]) -> str:
    """The expression that says: all of these at once."""
    parts = list(dict.fromkeys(names))
    return " AND ".join(f"({part})" if " OR " in part and len(parts) > 1 else part for part in parts)


def evaluate(expression: str, licence: Callable[[str], T], any_of: Callable[[list[T]], T], all_of: Callable[[list[T]], T]) -> T:
    """The value of an expression, from the values of its licences.

    Args:
        expression: SPDX.
        licence: Value of one licence.
        any_of: Value of `A OR B`.
        all_of: Value of `A AND B`.

    Raises:
        ValueError: If it is no SPDX expression.
    """
    tokens = _TOKEN.findall(expression)

    def take() -> str:
        if not tokens:
            raise ValueError(f"`{expression}` is not an SPDX expression: it ends too early")
        return str(tokens.pop(0))

    def term() -> T:
        token = take()
        if token == "(":
            value = alternatives()
            if take() != ")":
                raise ValueError(f"`{expression}` is not an SPDX expression: a parenthesis is open")
            return value
        if token.upper() in ("AND", "OR", "WITH") or not _NAME.fullmatch(token):
            raise ValueError(f"`{expression}` is not an SPDX expression: `{token}` where a licence should be")
        if tokens and tokens[0].upper() == "WITH":
            take()
            token = f"{token} WITH {take()}"
        return licence(token)

    def series(word: str, part: Callable[[], T], combine: Callable[[list[T]], T]) -> T:
        values = [part()]
        while tokens and tokens[0].upper() == word:
            take()
            values.append(part())
        return values[0] if len(values) == 1 else combine(values)

    def alternatives() -> T:
        return series("OR", lambda: series("AND", term, all_of), any_of)

    value = alternatives()
    if tokens:
        raise ValueError(f"`{expression}` is not an SPDX expression: `{tokens[0]}` is left over")
    return value
