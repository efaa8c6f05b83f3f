"""A ZenML for the legs of this test process, with a stack on each kind of store."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kitaru_zenml.journal.local import LocalStore
from tests.conftest import s3_store
from tests.crash.harness import ROOT, Case, Zygote, environment, fresh_folder


@dataclass
class World:
    """A ZenML with its zygote, and the stores of its stacks."""

    zygote: Zygote
    folder: Path
    env: dict[str, str]

    def register(self, name: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
        """Register a stack on an S3 artifact store, or describe the default one."""
        command = [sys.executable, "-m", "tests.crash.register", json.dumps(config or {}), name]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("STACK "))
        found: dict[str, Any] = json.loads(line[6:])
        return found


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("crash")
    env = environment(folder / "zenml")
    zygote = Zygote(env)
    yield World(zygote, folder, env)
    zygote.close()


@pytest.fixture(scope="session")
def stacks(world: World) -> dict[str, tuple[str, Any]]:
    """Stack id and store of each kind that has been asked for."""
    return {}


@pytest.fixture
def new_case(world: World, stacks: dict[str, tuple[str, Any]], request: pytest.FixtureRequest) -> Iterator[Callable[..., Case]]:
    """Makes a case on a kind of store: `new_case("local")`. What still runs at the end of the test is killed."""
    cases: list[Case] = []

    def make(kind: str = "local", **env: str) -> Case:
        if kind not in stacks:
            if kind == "local":
                found = world.register("default")
                stacks[kind] = found["id"], LocalStore(found["local"])
            else:
                s3 = request.getfixturevalue(kind)
                found = world.register(kind, s3.artifact_store_config("crash"))
                stacks[kind] = found["id"], s3_store(s3, "crash")
        stack, store = stacks[kind]
        cases.append(Case(world.zygote, fresh_folder(world.folder), store, {"ZENML_ACTIVE_STACK_ID": stack, **env}))
        return cases[-1]

    yield make
    for case in cases:
        case.end()
