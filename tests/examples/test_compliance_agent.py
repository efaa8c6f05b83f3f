"""The compliance agent: its rules, its report, and the demo that kills it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from examples.compliance_agent import packages
from examples.compliance_agent.agents import compliance
from examples.compliance_agent.records import PackageText
from kitaru_zenml import client, resume

ROOT = Path(__file__).resolve().parents[2]


def test_the_texts_of_an_installed_package_are_read() -> None:
    text = packages.read("click")
    assert text.version and "BSD" in text.licence and text.has_contact
    assert packages.findings(text) == []


def test_what_the_policy_does_not_like_is_found() -> None:
    text = PackageText(
        name="x", version="1", licence="", licence_files=[], has_contact=False, telemetry=["It sends telemetry."]
    )
    assert len(packages.findings(text)) == 4


def test_a_severe_finding_waits_for_a_person_and_a_denial_is_in_the_report() -> None:
    run = compliance.run(["click", "zenml"])
    assert run.status == "paused"
    [question] = client.waits(run.id)
    assert question.metadata["tool"] == "waive" and question.metadata["arguments"]["package"] == "zenml"
    client.answer(run.id, {"approve": False, "message": "bring the text"}, wait=question.wait)
    report = resume(run.id).result()
    assert {(e.package, e.state) for e in report.entries} == {("click", "passed"), ("zenml", "refused")}
    assert "bring the text" in next(e.because for e in report.entries if e.state == "refused")


def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "examples.compliance_agent.demo",
        "--folder",
        str(tmp_path / "demo"),
        "zenml",
        "click",
        "rich",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "finished and read again: 0" in done.stdout and "No model call and no tool call was made for it." in done.stdout
