"""The licence audit: what it finds in an environment of made-up distributions, and that a killed audit repeats no call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from examples.license_audit import demo, model, scripted, spdx, tools
from examples.license_audit.calls import CallMade, calls_made
from examples.license_audit.flow import license_audit
from examples.license_audit.records import Classification, Conflict, FoundLicence, LicenceText, Metadata, PackageAudit

ROOT = Path(__file__).resolve().parent.parent.parent
POLICY = ROOT / "examples" / "license_audit" / "policy.toml"

MIT = """MIT License
Permission is hereby granted, free of charge, to any person obtaining a copy of this software, to deal in the Software
without restriction, subject to the following conditions:
The above copyright notice and this permission notice shall be included in all copies."""
APACHE = "Apache License\n                           Version 2.0, January 2004\n   TERMS AND CONDITIONS"
BSD3 = """Redistribution and use in source and binary forms, with or without modification, are permitted:
* Neither the name of the copyright holder nor the names of its contributors may be used to endorse or promote products."""
BSD2 = "Redistribution and use in source and binary forms, with or without modification, are permitted. 1. 2."
GPL = "GNU GENERAL PUBLIC LICENSE\n Version 3, 29 June 2007\n Everyone is permitted to copy and distribute verbatim copies"
GCC = GPL + "\nAs a special exception: the GCC Runtime Library Exception applies."
LGPL = "GNU LESSER GENERAL PUBLIC LICENSE\n Version 3, 29 June 2007"
ODD = "Do what you like with it on Sundays."


def install(folder: Path, name: str, *, metadata: str = "", **texts: str) -> None:
    """Install a distribution that consists of metadata and licence files."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{metadata}")
    for file, text in texts.items():
        (info / file).write_text(text)
    (info / "RECORD").write_text("".join(f"{info.name}/{file},,\n" for file in ("METADATA", *texts)))


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A `site-packages` with one distribution of each kind."""
    folder = tmp_path / "site-packages"
    install(folder, "bright", metadata="License-Expression: MIT\n", LICENSE=MIT)
    install(folder, "classic", metadata="Classifier: License :: OSI Approved :: BSD License\n", LICENSE=BSD3)
    install(folder, "heavy", metadata="License: Apache 2.0\n", LICENSE=APACHE)
    install(folder, "liar", metadata="License-Expression: MIT\n", COPYING=BSD2)
    install(folder, "mute")
    install(folder, "odd", LICENSE=ODD)
    install(folder, "sticky", metadata="License: GPLv3\n", LICENSE=GPL)
    return folder


def audit(environment: Path, report: Path) -> dict[str, Any]:
    handle = license_audit.run(scripted.NAME, str(POLICY), str(report), str(environment))
    files = handle.result()
    assert files.model == scripted.NAME
    content: dict[str, Any] = json.loads(Path(files.json_file).read_text())
    return content


def test_an_audit_classifies_what_is_installed_and_judges_what_the_policy_does_not_allow(
    environment: Path, tmp_path: Path
) -> None:
    report = audit(environment, tmp_path / "report")

    assert {p["metadata"]["name"]: p["classification"]["expression"] for p in report["packages"]} == {
        "bright": "MIT",
        "classic": "BSD-3-Clause",
        "heavy": "Apache-2.0",
        "liar": "BSD-2-Clause",
        "mute": "NOASSERTION",
        "odd": "NOASSERTION",
        "sticky": "GPL-3.0-or-later",
    }
    decisions = {c["conflict"]["name"]: (c["conflict"]["verdict"], c["judgement"]["decision"]) for c in report["conflicts"]}
    assert decisions == {
        "liar": ("allowed", "ask a person"),
        "mute": ("review", "ask a person"),
        "odd": ("review", "ask a person"),
        "sticky": ("denied", "replace"),
    }
    assert report["verdicts"] == {"allowed": 4, "review": 2, "denied": 1}


def test_the_report_says_which_model_judged_and_why_each_conflict_is_one(environment: Path, tmp_path: Path) -> None:
    audit(environment, tmp_path / "report")

    text = (tmp_path / "report" / "report.md").read_text()
    assert scripted.NAME in text
    assert "| sticky 1.0 | GPL-3.0-or-later | denied | GPL-3.0-or-later | **replace** |" in text
    assert "liar: The licence expression says MIT, the texts are BSD-2-Clause." in text
    assert text.index("sticky 1.0") < text.index("liar 1.0"), "what is denied comes first"


def test_model_steps_log_what_they_consumed(environment: Path, tmp_path: Path) -> None:
    from kitaru_zenml.runs import find_run, open_journal

    handle = license_audit.run(scripted.NAME, str(POLICY), str(tmp_path / "report"), str(environment), ["bright", "sticky"])

    records = open_journal(find_run(handle.id)).load().records.values()
    usages = {r.name: r.usage for r in records if r.usage is not None}
    assert usages.keys() == {"classify", "judge"}
    assert all(
        u.model == scripted.NAME and u.input_tokens > 20 and u.output_tokens > 5 and u.cost == 0 for u in usages.values()
    )


# --- the parts -----------------------------------------------------------------------------------------------------------


def read(*texts: str, **fields: Any) -> Classification:
    metadata = Metadata(name="thing", version="1.0", **fields)
    return scripted.classify(metadata, [LicenceText(file=f"LICENSE{i}", text=text) for i, text in enumerate(texts)])


@pytest.mark.parametrize(
    ("texts", "fields", "expression", "confidence"),
    [
        ((MIT,), {"expression": "MIT"}, "MIT", "high"),
        ((MIT,), {}, "MIT", "medium"),
        ((), {"classifiers": ["MIT License"]}, "MIT", "medium"),
        ((), {}, "NOASSERTION", "low"),
        ((APACHE, BSD3), {"expression": "Apache-2.0 OR BSD-3-Clause"}, "Apache-2.0 OR BSD-3-Clause", "high"),
        ((APACHE, MIT), {"classifiers": ["Apache Software License", "MIT License"]}, "Apache-2.0 OR MIT", "high"),
        ((BSD2,), {"licence_field": "BSD"}, "BSD-2-Clause", "high"),
        ((BSD3, LGPL), {"expression": "BSD-3-Clause"}, "BSD-3-Clause AND LGPL-3.0-or-later", "high"),
        (
            (BSD3 + "\n" + GCC,),
            {"expression": "BSD-3-Clause"},
            "BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1",
            "high",
        ),
        ((BSD3,), {"expression": "MIT"}, "BSD-3-Clause", "low"),
        ((BSD3,), {"expression": "MIT AND BSD-3-Clause"}, "MIT AND BSD-3-Clause", "medium"),
    ],
)
def test_the_scripted_model_believes_the_texts_first(
    texts: tuple[str, ...], fields: dict[str, Any], expression: str, confidence: str
) -> None:
    answer = read(*texts, **fields)
    assert (answer.expression, answer.confidence) == (expression, confidence)


def test_a_text_that_is_bundled_but_not_declared_is_reported_with_its_file() -> None:
    metadata = Metadata(name="thing", version="1.0", expression="MIT")
    answer = Classification(
        expression="MIT AND LGPL-3.0-or-later",
        confidence="high",
        found=[FoundLicence(file="LICENSE", licence="MIT"), FoundLicence(file="vendor/LICENSE", licence="LGPL-3.0-or-later")],
    )
    (only,) = tools.cross_check(metadata, answer)
    assert only.kind == "undeclared"
    assert only.message == "vendor/LICENSE holds LGPL-3.0-or-later, which the metadata do not declare."


@pytest.mark.parametrize(
    ("expression", "verdict", "licence"),
    [
        ("MIT", "allowed", "MIT"),
        ("GPL-2.0-or-later OR MIT", "allowed", "MIT"),
        ("MIT AND MPL-2.0", "review", "MPL-2.0"),
        ("MIT AND (GPL-3.0-only OR Apache-2.0)", "allowed", "MIT"),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", "review", "GPL-3.0-or-later WITH GCC-exception-3.1"),
        ("GPL-3.0-or-later", "denied", "GPL-3.0-or-later"),
        ("NOASSERTION", "review", "NOASSERTION"),
        ("MIT AND", "review", "MIT AND"),
    ],
)
def test_the_policy_takes_the_better_of_or_and_the_worse_of_and(expression: str, verdict: str, licence: str) -> None:
    assert tools.verdict_on(expression, tools.read_policy(str(POLICY)))[:2] == (verdict, licence)


@pytest.mark.parametrize("broken", ["", "MIT OR", "(MIT", "MIT Apache-2.0", "AND MIT", "MIT)"])
def test_what_is_no_expression_is_refused(broken: str) -> None:
    with pytest.raises(ValueError, match="not an SPDX expression"):
        spdx.identifiers(broken)


@pytest.mark.parametrize(
    ("declared", "kinds"),
    [("MIT/X11 or so", []), ("Whatever (see file)", ["no declaration"]), ("BSD, mostly", ["contradiction", "undeclared"])],
)
def test_a_declaration_that_is_no_expression_is_understood_or_reported_but_never_fatal(declared: str, kinds: list[str]) -> None:
    answer = read(MIT, expression=declared)
    problems = tools.cross_check(Metadata(name="thing", version="1.0", expression=declared), answer)
    assert answer.expression == "MIT"
    assert [p.kind for p in problems] == kinds


# --- a real provider -----------------------------------------------------------------------------------------------------


class _Provider(BaseHTTPRequestHandler):
    replies: list[tuple[int, str]] = []
    asked: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        status, text = self.replies.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = HTTPServer(("127.0.0.1", 0), _Provider)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_MODEL", "some-model")
    monkeypatch.setenv("LICENSE_AUDIT_PRICE", "1,10")
    _Provider.replies, _Provider.asked = [], []
    yield _Provider
    server.shutdown()
    server.server_close()


CONFLICT = Conflict(name="x", version="1", expression="GPL-3.0-only", verdict="denied", licence="GPL-3.0-only", reason="no")


def reply(content: str) -> str:
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    return json.dumps({"choices": [{"message": {"content": content}}], "usage": usage})


def test_a_provider_is_asked_when_a_key_is_set_and_its_usage_is_counted(provider: Any) -> None:
    provider.replies = [(200, reply('{"decision": "replace", "rationale": "because"}'))]

    name = model.chosen_model()
    answer, usage = model.model_named(name).judge(CONFLICT)

    assert (name, answer.decision) == ("openai:some-model", "replace")
    assert (usage.model, usage.input_tokens, usage.output_tokens) == ("some-model", 1000, 100)
    assert usage.cost == pytest.approx(0.002)
    (asked,) = provider.asked
    assert (asked["path"], asked["key"], asked["model"]) == ("/v1/chat/completions", "Bearer key", "some-model")


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (503, "busy", model.ModelUnavailable),
        (429, "slower", model.ModelUnavailable),
        (200, "not json", model.ModelUnavailable),
        (200, reply('{"decision": "perhaps"}'), model.ModelUnavailable),
        (401, "who are you", model.ModelRefused),
    ],
)
def test_only_what_may_pass_is_worth_another_try(provider: Any, status: int, text: str, error: type[Exception]) -> None:
    provider.replies = [(status, text)]
    with pytest.raises(error):
        model.model_named("openai:some-model").judge(CONFLICT)


def test_an_audit_that_began_with_a_provider_asks_for_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(model.ModelRefused, match="OPENAI_API_KEY"):
        model.model_named("openai:some-model").judge(CONFLICT)


# --- killed and resumed --------------------------------------------------------------------------------------------------

SOME = [
    "attrs",
    "boto3",
    "certifi",
    "click",
    "cryptography",
    "pluggy",
    "PyYAML",
    "requests",
    "rich",
    "six",
    "typing_extensions",
    "zenml",
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stack", ["local", pytest.param("s3", marks=pytest.mark.server)])
def test_the_demo_kills_and_resumes_an_audit_and_no_finished_call_is_made_twice(stack: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "examples.license_audit.demo",
        "--stack",
        stack,
        "--folder",
        str(tmp_path),
        "--only",
        *SOME,
    ]
    slowly = {**os.environ, "LICENSE_AUDIT_LATENCY": "0.5"}  # so few distributions are done in no time
    shown = subprocess.run(command, cwd=ROOT, env=slowly, capture_output=True, text=True, timeout=230, stdin=subprocess.DEVNULL)

    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "finished steps that ran again: 0" in shown.stdout
    assert scripted.NAME in shown.stdout
    calls = calls_made(tmp_path / stack / "calls.jsonl")
    assert len({call.pid for call in calls}) == 2, "one process was killed, another one resumed"
    report = json.loads((tmp_path / stack / "report" / "report.json").read_text())
    assert sorted(p["metadata"]["name"] for p in report["packages"]) == sorted(SOME)


def test_the_proof_of_the_demo_sees_a_finished_step_that_ran_again() -> None:
    at_kill, at_end = {"/a": "read", "/b": "read"}, {"/a": "read", "/b": "read", "/c": "read"}
    first = [CallMade("read", "a", "/a", 1), CallMade("read", "b", "/b", 1), CallMade("read", "c", "/c", 1)]

    honest = demo.prove(at_kill, at_end, [*first, CallMade("read", "c", "/c", 2)], killed=1)
    broken = demo.prove(at_kill, at_end, [*first, CallMade("read", "b", "/elsewhere", 2)], killed=1)

    assert (honest.repeated, honest.in_flight, honest.lost) == ([], ["read c"], 0)
    assert broken.repeated == ["read b"]


def test_an_audit_is_a_pure_function_of_what_is_installed(environment: Path) -> None:
    conflicts = [_conflicts(environment) for _ in range(2)]
    assert conflicts[0] == conflicts[1]


def _conflicts(environment: Path) -> list[Conflict]:
    audits = []
    for one in tools.list_distributions(str(environment), None):
        metadata, texts = tools.read_metadata(one), tools.read_licence_files(one)
        answer = scripted.classify(metadata, texts)
        audits.append(PackageAudit(metadata=metadata, classification=answer, discrepancies=tools.cross_check(metadata, answer)))
    return tools.find_conflicts(audits, tools.read_policy(str(POLICY)))
