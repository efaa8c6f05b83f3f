"""What durability costs an agent: the same scripted agent plain, with Kitaru, with DBOS on SQLite, and with Prefect.

A turn is a model request and a tool call, both of which do next to nothing. Each engine runs in processes of its own:

    seconds a turn     of a whole run, measured inside it
    bytes a turn       what the engine has stored at the end (Kitaru: the journal; DBOS: its SQLite file; Prefect: results and SQLite file)
    resume             seconds from the start of a new process until the first new call, after a SIGKILL at nine tenths of the run
    repeated           finished tool calls that were made again; the last one before the kill may have had no record yet and does not count

    python bench/pydantic_ai_overhead.py --turns 100 --rounds 3 --dbos-python OTHER/bin/python --prefect-python OTHER/bin/python

DBOS and Prefect may live in another environment than ZenML, which pins other versions of the same libraries; an engine without an
interpreter is left out, and the result says so. Writes bench/results/pydantic_ai_overhead.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("plain", "kitaru", "dbos", "prefect")


# --- the agent -----------------------------------------------------------------------------------------------------------


def agent_with(*capabilities: Any) -> Any:
    """An agent that calls its tool `TURNS` times, then ends."""
    from pydantic_ai import Agent
    from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
    from pydantic_ai.models.function import FunctionModel

    turns = int(os.environ["TURNS"])

    def scripted(messages: list[Any], info: Any) -> ModelResponse:
        n = sum(isinstance(m, ModelResponse) for m in messages)
        if n < turns:
            return ModelResponse(parts=[ToolCallPart("note", {"n": n}, f"call_{n}")])
        return ModelResponse(parts=[TextPart("done")])

    agent = Agent(FunctionModel(scripted, model_name="scripted"), name="bench", capabilities=list(capabilities))

    @agent.tool_plain
    async def note(n: int) -> str:
        _note_call(n)
        return f"noted {n}: " + "x" * 200

    return agent


def _note_call(n: int) -> None:
    with open(os.environ["CALLS"], "a") as file:
        file.write(f"{n} {time.time()}\n")


async def talk(agent: Any) -> float:
    """One run; how long it took."""
    from pydantic_ai.usage import UsageLimits

    began = time.perf_counter()
    await agent.run("go", usage_limits=UsageLimits(request_limit=None))
    return time.perf_counter() - began


# --- engines: each runs, or resumes what was killed, and says how long the agent's run took ------------------------------


def plain(resume: bool) -> float:
    return asyncio.run(talk(agent_with()))


def kitaru(resume: bool) -> float:
    import pydantic_ai_flow

    if not resume:
        return float(pydantic_ai_flow.bench.run().result())
    from zenml.client import Client

    from kitaru_zenml import resume as resume_run

    [run] = Client().list_pipeline_runs(size=1, sort_by="desc:created").items
    return float(resume_run(run.id).result())


def dbos(resume: bool) -> float:
    from dbos import DBOS, SetWorkflowID
    from pydantic_ai.durable_exec.dbos import DBOSDurability

    DBOS(
        config={
            "name": "bench",
            "system_database_url": f"sqlite:///{os.environ['FOLDER']}/dbos.sqlite",
            "run_admin_server": False,
        }
    )
    agent = agent_with(DBOSDurability())

    @DBOS.workflow()
    async def bench() -> float:
        return await talk(agent)

    async def main() -> float:
        DBOS.launch()
        if resume:
            handle = await DBOS.retrieve_workflow_async("bench-1")
        else:
            with SetWorkflowID("bench-1"):
                handle = await DBOS.start_workflow_async(bench)
        return float(await handle.get_result())

    return asyncio.run(main())


def prefect(resume: bool) -> float:
    from prefect import flow
    from pydantic_ai.durable_exec.prefect import PrefectDurability

    agent = agent_with(PrefectDurability())

    @flow(name="bench", persist_result=True)
    async def bench() -> float:
        return await talk(agent)

    return float(asyncio.run(bench()))


# --- measuring -----------------------------------------------------------------------------------------------------------


class Subject:
    """An engine in a fresh folder, with the processes that run it."""

    def __init__(self, engine: str, python: str, turns: int) -> None:
        """Make the folder."""
        self.engine, self.python, self.turns = engine, python, turns
        self.folder = Path(tempfile.mkdtemp(prefix=f"bench-{engine}-"))
        self.calls = self.folder / "calls"
        self.calls.touch()
        self.env = {
            **os.environ, "TURNS": str(turns), "CALLS": str(self.calls), "FOLDER": str(self.folder),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations"), str(ROOT / "stacks")]),
            "ZENML_CONFIG_PATH": str(self.folder / "zenml"), "ZENML_ANALYTICS_OPT_IN": "false", "ZENML_LOGGING_VERBOSITY": "ERROR",
            "KITARU_PROGRESS": "0", "PREFECT_HOME": str(self.folder / "prefect"), "PREFECT_LOGGING_LEVEL": "CRITICAL",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        }  # fmt: skip
        (self.folder / "zenml").mkdir()

    def start(self, *mode: str) -> subprocess.Popen[str]:
        """Start the run, or its resume."""
        command = [self.python, str(Path(__file__).resolve()), "--engine", self.engine, *mode]
        log = (self.folder / "log").open("a")
        return subprocess.Popen(command, env=self.env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)

    def finish(self, process: subprocess.Popen[str]) -> float:
        """Wait for its end; the seconds of the agent's run."""
        out = process.communicate(timeout=600)[0]
        line = next((line for line in out.splitlines() if line.startswith("SECONDS ")), None)
        assert line is not None, f"{self.engine}: {out[-1000:]}{(self.folder / 'log').read_text()[-3000:]}"
        return float(line.split()[1])

    def made(self) -> list[tuple[int, float]]:
        """(turn, when) of each tool call that was really made."""
        lines = [line.split() for line in self.calls.read_text().splitlines()]
        return [(int(n), float(at)) for n, at in lines]

    def stored(self) -> int:
        """Bytes that the engine has stored of the run."""
        places = {"kitaru": "zenml/local_stores/*/kitaru/[0-9a-f]*-*/**/*", "dbos": "dbos.sqlite*", "prefect": "prefect/**/*"}
        if self.engine not in places:
            return 0
        return sum(
            path.stat().st_size for path in self.folder.glob(places[self.engine]) if path.is_file() and path.suffix != ".log"
        )

    def close(self) -> None:
        """Remove its folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def measure(engine: str, python: str, turns: int) -> dict[str, Any]:
    """One round of an engine."""
    whole = Subject(engine, python, turns)
    took = whole.finish(whole.start())
    found: dict[str, Any] = {"ms_a_turn": 1000 * took / turns, "bytes_a_turn": whole.stored() / turns}
    whole.close()
    if engine == "plain":
        return found
    cut = Subject(engine, python, turns)
    process = cut.start()
    while len(cut.made()) < turns * 9 // 10:
        assert process.poll() is None, (cut.folder / "log").read_text()[-3000:]
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    before, began = cut.made(), time.time()
    cut.finish(cut.start("--resume"))
    after = cut.made()[len(before) :]
    finished = {n for n, _ in before} - {before[-1][0]}
    repeated = Counter(n for n, _ in after if n in finished)
    new = [at for n, at in after if n not in finished]
    found |= {"resume_s": (new[0] if new else time.time()) - began, "repeated": sum(repeated.values())}
    cut.close()
    return found


def main() -> None:
    """Measure every engine that there is an interpreter for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dbos-python")
    parser.add_argument("--prefect-python")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine:
        print("SECONDS", globals()[asked.engine](asked.resume), flush=True)
        return
    pythons = {"plain": sys.executable, "kitaru": sys.executable, "dbos": asked.dbos_python, "prefect": asked.prefect_python}
    rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES if pythons[engine]}
    for _ in range(asked.rounds):  # interleaved, so that what else the machine does hits all
        for engine, found in rounds.items():
            found.append(measure(engine, pythons[engine], asked.turns))
            print(engine, found[-1], flush=True)
    result = {
        "turns": asked.turns, "rounds": asked.rounds, "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "not measured": [engine for engine in ENGINES if not pythons[engine]],
        "median": {engine: {k: statistics.median(r[k] for r in found) for k in found[0]} for engine, found in rounds.items()},
        "rounds of each": rounds,
    }  # fmt: skip
    target = ROOT / "bench" / "results" / "pydantic_ai_overhead.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["median"], indent=2))


if __name__ == "__main__":
    main()
