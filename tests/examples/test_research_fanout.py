"""The research: what the scripted model makes of the standard library, and the whole of it with a kill, a failure and a fork."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.research_fanout import library, model
from examples.research_fanout.flow import Finding, UnparsableAnswer, parse_answer
from examples.research_fanout.library import Entry

ROOT = Path(__file__).resolve().parents[2]


def test_the_catalogue_lists_modules_by_what_they_say_of_themselves() -> None:
    about = {entry.module: entry.about for entry in library.catalogue()}
    assert about["concurrent.futures"] == "Execute computations asynchronously using threads or processes."
    assert len(about) > 100 and not any(name.startswith("_") for name in about)


def test_a_package_is_read_with_all_its_modules_and_each_passage_says_where_it_is() -> None:
    sources = {passage.name: passage.source for passage in library.read_module("concurrent.futures")}
    assert sources["Future"].startswith("concurrent/futures/_base.py:")
    file, line = sources["Executor"].split(":")
    assert "class Executor" in (library.LIBRARY / file).read_text().splitlines()[int(line) - 1]


def test_the_scripted_model_plans_what_fits_and_answers_in_prose_where_it_should_not() -> None:
    entries = [Entry(module="threading", about="Threads."), Entry(module="colorsys", about="Conversion between colours.")]
    assert model.plan("question", entries) == ["threading"]
    answers = {module: model.fetch(model.order("q", module, library.read_module(module))) for module in ("queue", model.CHATTY)}
    assert len(Finding.model_validate_json(answers["queue"]).points) == 3
    with pytest.raises(UnparsableAnswer, match="Sure!"):
        parse_answer(answers[model.CHATTY])


@pytest.mark.timeout(900)
def test_the_demo_starts_each_run_once_and_takes_the_corrected_result(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.research_fanout.demo", "--folder", str(tmp_path / "demo")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880, stdin=subprocess.DEVNULL)

    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "5 topics, 5 child runs, 1 fork, 1 report" in shown.stdout
    report = (tmp_path / "demo" / "research.md").read_text()
    assert report.count("\n## ") == 5 and "Corrected by hand:" in report
