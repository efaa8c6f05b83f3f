"""Every snippet in README and docs runs: Python as a module, commands of ours as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kitaru_zenml.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
PYTHON = [
    (page, n, code) for page in PAGES for n, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize(("page", "number", "code"), PYTHON, ids=[f"{p.name}-{n}" for p, n, _ in PYTHON])
def test_a_python_snippet_runs(page: Path, number: int, code: str, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(code)
    done = subprocess.run([sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    if page.name == "README.md" and page.parent == ROOT:
        assert "completed published" in done.stdout or "completed refunded" in done.stdout


def test_every_kitaru_command_in_the_docs_exists_with_its_options() -> None:
    said = {(page.name, line) for page in PAGES for line in re.findall(r"kitaru ([a-z]+(?: [^`\n#|]*)?)", page.read_text())}
    checked = 0
    for page, line in said:
        words = line.split()
        if words[0] not in COMMANDS:
            continue  # prose: "kitaru runs on ..."
        help_text = subprocess.run(
            [sys.executable, "-m", "kitaru_zenml.cli.main", words[0], "--help"],
            capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"},
        ).stdout  # fmt: skip
        for option in re.findall(r"--[a-z-]+", line):
            assert option in help_text, f"{page}: `kitaru {line}`"
            checked += 1
    assert checked >= 3


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {t for page in PAGES for t in re.findall(r"(?:^|`| )make ([a-z-]+)", page.read_text(), re.M)}
    assert (
        named & targets
        and not {t for t in named if t.startswith("demo") or t in ("test", "bench", "lint", "types", "setup")} - targets
    )


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tests_named_in_the_docs_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"`(tests/[a-z_/]+\.py)`", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
