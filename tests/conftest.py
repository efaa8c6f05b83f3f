"""What every test stands on: a ZenML of its own, and the services that some ask for.

`store` runs a test on each kind of store. Services start once a test process; a test that needs one that cannot run here is skipped with
the reason.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

_zenml = Path(tempfile.mkdtemp(prefix="kitaru-test-"))
os.environ.update(
    ZENML_CONFIG_PATH=str(_zenml / "config"),
    ZENML_ANALYTICS_OPT_IN="false",
    ZENML_LOGGING_VERBOSITY="WARN",
    AUTO_OPEN_DASHBOARD="false",
    KITARU_PROGRESS="0",
)
(_zenml / "config").mkdir()

from kitaru_zenml.journal.local import LocalStore  # noqa: E402
from kitaru_zenml.journal.object_store import CLIENT_OPTIONS, ObjectStore, retry_options  # noqa: E402
from kitaru_zenml_stacks import loopback  # noqa: E402

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _own_zenml() -> Iterator[None]:
    from zenml.utils import source_utils

    source_utils.set_custom_source_root(str(Path(__file__).resolve().parents[1]))  # a test process has no main file to go by
    yield
    shutil.rmtree(_zenml, ignore_errors=True)


@pytest.fixture(scope="session")
def moto() -> Iterator[loopback.S3]:
    """An S3 endpoint by moto."""
    with loopback.moto_s3() as s3:
        yield s3


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback.S3]:
    """Ceph's S3 gateway, a real one."""
    try:
        with loopback.ceph_s3(tmp_path_factory.mktemp("ceph")) as s3:
            yield s3
    except loopback.Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def zenml_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback.Server]:
    """A ZenML server over REST."""
    with loopback.zenml_server(tmp_path_factory.mktemp("server")) as server:
        yield server


def s3_store(
    s3: loopback.S3, prefix: str, *, endpoint: str | None = None, patience: float = 20, read_timeout: float = 20, **config: Any
) -> ObjectStore:
    """A store below a prefix of the endpoint's bucket."""
    import obstore.store

    stores: Any = obstore.store
    settings = {
        "endpoint": endpoint or s3.endpoint, "access_key_id": s3.access_key, "secret_access_key": s3.secret_key, "region": "us-east-1",
        "virtual_hosted_style_request": False,
    } | config  # fmt: skip
    client = stores.S3Store(
        s3.bucket, prefix=prefix, config=settings, retry_config=retry_options(patience),
        client_options={**CLIENT_OPTIONS, "allow_http": True, "read_timeout": timedelta(seconds=read_timeout)},
    )  # fmt: skip
    return ObjectStore(client, f"{s3.uri}/{prefix}", patience)


@pytest.fixture(params=["local", "moto", pytest.param("ceph", marks=pytest.mark.ceph)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore | ObjectStore:
    """An empty store of each kind."""
    if request.param == "local":
        return LocalStore(str(tmp_path))
    return s3_store(request.getfixturevalue(request.param), f"p{os.getpid()}-{next(_numbers)}")
