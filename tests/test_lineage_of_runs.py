"""What ZenML knows of a run, on a real ZenML: SQLite here, a server over REST below."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from zenml.client import Client

from kitaru_zenml.lineage.failure import load_failure
from kitaru_zenml.runs import find_run, open_journal
from kitaru_zenml_stacks import loopback
from tests import flows_in_process as flows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    handle = flows.research.run(str(tmp_path_factory.mktemp("notes")))
    assert handle.status == "completed"
    return handle


@pytest.fixture(scope="module")
def steps(run: Any) -> dict[str, Any]:
    return {s.name: s for s in Client().list_run_steps(pipeline_run_id=run.id, size=100, hydrate=True).items}


def test_each_step_is_one_step_run(steps: dict[str, Any]) -> None:
    assert sorted(steps) == ["find#0", "find#1", "note#0", "now#0", "summarise#0", "table#0", "vector#0"]
    assert {s.status.value for s in steps.values()} == {"completed"}


def test_an_input_that_is_another_steps_output_is_linked_to_it_also_inside_lists_and_dicts(steps: dict[str, Any]) -> None:
    summarise, outputs = steps["summarise#0"], {n: steps[n].outputs["output"][0].id for n in ("find#0", "find#1")}
    linked = {name: {v.id for v in versions} for name, versions in summarise.inputs.items()}
    assert linked == {"findings": set(outputs.values()), "by": {outputs["find#0"]}}


def test_model_tokens_and_metadata_are_on_the_step_run(steps: dict[str, Any]) -> None:
    said = str(steps["find#0"].run_metadata)
    assert "model-x" in said and "web" in said


def test_a_page_shows_the_exchange(steps: dict[str, Any]) -> None:
    page = steps["find#0"].outputs["output"][0].visualizations
    assert page and page[0].type.value == "html"
    assert "antsants" in Path(page[0].uri).read_text()


def test_artifacts_load_in_a_process_that_never_saw_the_flow(steps: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "load.py"
    ids = {name: str(steps[name].outputs["output"][0].id) for name in ("summarise#0", "table#0", "vector#0")}
    script.write_text(
        textwrap.dedent(
            f"""
            from zenml.client import Client
            for name, id in {ids!r}.items():
                value = Client().get_artifact_version(id).load()
                print("LOADED", type(value).__name__, len(value))
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    loaded = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert loaded == [["str", "242"], ["DataFrame", "4"], ["ndarray", "4"]], done.stderr[-1500:]


def test_pandas_numpy_and_paths_come_back_by_their_materializers(run: Any) -> None:
    assert run.result().endswith(f" 6 hello {time.gmtime().tm_year}")


def test_failed_attempts_and_failures_are_shown_with_their_exception() -> None:
    with pytest.raises(ConnectionError):
        flows.failing.run()
    newest = Client().list_pipeline_runs(pipeline="failing", sort_by="desc:created", size=1).items[0]
    tries = [s for s in Client().list_run_steps(pipeline_run_id=newest.id, hydrate=True, size=20).items if s.name == "never#0"]
    assert sorted(s.status.value for s in tries) == ["failed", "retried"]
    assert all("the model is down" in str(s.exception_info) for s in tries)
    assert newest.status.value == "failed"
    report = load_failure(open_journal(find_run(newest.id)).store, str(newest.id))
    assert report is not None and report.failing_step is not None and report.failing_step.display == "never#0"
    versions = Client().list_artifact_versions(artifact="failing.failure").items
    assert versions and versions[0].load() is not None


def test_sync_lineage_registers_each_step_before_the_next() -> None:
    assert flows.in_step_with_zenml.run(3).result() == [0, 1, 2]


def test_an_isolated_step_runs_here_where_the_orchestrator_cannot_isolate_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert flows.with_heavy.run(2).result() == 5
    assert any("orchestrator cannot do" in r.getMessage() for r in caplog.records)


# --- over REST -----------------------------------------------------------------------------------------------------------


def in_process(env: dict[str, str], code: str, folder: Path) -> subprocess.Popen[str]:
    script = folder / "work.py"
    script.write_text(textwrap.dedent(code))
    environment = {**os.environ, **env, "PYTHONPATH": f"{ROOT}"}
    return subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


@pytest.fixture
def own_server(tmp_path: Path) -> tuple[Path, int]:
    return tmp_path / "server", loopback.free_port()


@pytest.mark.server
@pytest.mark.timeout(240)
def test_steps_go_on_while_the_server_is_down_and_lineage_is_complete_when_it_is_back(
    own_server: tuple[Path, int], tmp_path: Path
) -> None:
    folder, port = own_server
    with loopback.zenml_server(folder, port=port) as server:
        env = server.client_env(tmp_path / "client")
        work = in_process(
            env,
            """
            import sys
            from tests import flows_in_process as flows
            handle = flows.slow_steps.run(20, 0.4)
            from zenml.client import Client
            steps = Client().list_run_steps(pipeline_run_id=handle.id, size=100).items
            print("ENDED", handle.status, len(steps), len({s.name for s in steps}))
            """,
            tmp_path,
        )
        store = tmp_path / "client" / "local_stores"
        await_records(store, 3)
    while_down = count(store)
    time.sleep(3)
    assert count(store) > while_down, "steps waited for the server"
    with loopback.zenml_server(folder, port=port):
        said, _ = work.communicate(timeout=150)
    assert "ENDED completed 20 20" in said, said[-3000:]


def count(root: Path) -> int:
    return len(list(root.glob("*/kitaru/*/steps/*.json")))


def await_records(root: Path, n: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while count(root) < n:
        assert time.monotonic() < deadline, "the flow does not come along"
        time.sleep(0.1)
