"""Legs of flows with agents, and the server that plays the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.conftest import World, new_case, stacks  # noqa: F401  # fixtures
from tests.crash.harness import Case, Zygote, environment
from tests.integrations.pydantic_ai.scripts import script
from tests.openai_server import OpenAIServer, serving


@pytest.fixture(scope="session")
def server() -> Iterator[OpenAIServer]:
    """The server of every agent here; the models are made when the flows are imported."""
    with serving(script) as server:
        os.environ["OPENAI_TEST_URL"] = server.base_url
        yield server


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, server: OpenAIServer) -> Iterator[World]:
    """A ZenML whose legs have the agents imported."""
    folder = tmp_path_factory.mktemp("agents")
    env = environment(folder / "zenml", ZYGOTE_IMPORTS="tests.integrations.pydantic_ai.flows")
    zygote = Zygote(env)
    yield World(zygote, folder, env)
    zygote.close()


@pytest.fixture
def agent_case(new_case: Callable[..., Case], tmp_path: Path) -> Callable[[], Case]:  # noqa: F811
    """Makes a case; what its event handlers hear goes to a file of the test."""
    return lambda: new_case(DELTAS=str(tmp_path / "deltas"))
