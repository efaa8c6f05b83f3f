"""What the research reads: the sources of Python's standard library, as they lie on this machine."""

from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path

from pydantic import BaseModel

LIBRARY = Path(sysconfig.get_path("stdlib"))
_HEAD = re.compile(r"\A(?:\s|#[^\n]*\n)*[rR]?(?:\"\"\"(.+?)\"\"\"|'''(.+?)''')", re.S)


class Entry(BaseModel):
    """A module, and the first paragraph of what it says about itself."""

    module: str
    about: str


class Passage(BaseModel):
    """A documented class or function."""

    name: str
    source: str  # file:line
    text: str  # first paragraph of its docstring


def catalogue() -> list[Entry]:
    """The public modules and packages that say what they are for, but for those that are about to go."""
    files = {file.stem: file for file in LIBRARY.glob("*.py")} | {
        file.parent.name: file for file in LIBRARY.glob("*/__init__.py")
    }
    files["concurrent.futures"] = LIBRARY / "concurrent" / "futures" / "__init__.py"
    entries = []
    for module, file in sorted(files.items()):
        text = file.read_text(errors="replace")
        found = _HEAD.match(text)
        if found and not module.startswith("_") and "_deprecated(__name__" not in text:
            entries.append(Entry(module=module, about=_paragraph(found[1] or found[2])))
    return entries


def read_module(module: str) -> list[Passage]:
    """The documented classes and functions of a module, or of all modules of a package."""
    place = LIBRARY.joinpath(*module.split("."))
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return [passage for file in files for passage in _passages(file)]


def _passages(file: Path) -> list[Passage]:
    found = []
    for node in ast.parse(file.read_text(errors="replace")).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if text := ast.get_docstring(node):
            source = f"{file.relative_to(LIBRARY)}:{node.lineno}"
            found.append(Passage(name=node.name, source=source, text=_paragraph(text)))
    return found


def _paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n", 1)[0].split())
