"""A worker for the tests of a module, and a file for the effects."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from tests.worker.harness import Worker

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _effects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("effects") / "effects"
    file.touch()
    os.environ["WORKER_EFFECTS"] = str(file)
    from zenml.client import Client

    Client().active_stack.artifact_store.path
    yield
    del os.environ["WORKER_EFFECTS"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, _effects: None) -> Iterator[Worker]:
    """A worker that runs as long as the tests of the module."""
    worker = Worker(
        tmp_path_factory.mktemp("worker"), "--max-crashes", "3", "--sweep", "3", "--limit", "gpu=1", "--limit", "provider=2",
        "--http", "0", "--verbose",
    )  # fmt: skip
    yield worker.up()
    worker.stop()


@pytest.fixture
def name() -> str:
    """A name for what a run does."""
    return f"run{next(_numbers)}"
