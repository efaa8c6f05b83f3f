"""The store of a real ZenML S3 artifact store component, with its credentials from each place they can come from."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.stack import StackComponent

from kitaru_zenml import artifact_store as module
from kitaru_zenml.artifact_store import open_store, probe_conditional
from kitaru_zenml.errors import StoreAccessDenied, StoreNotConditional
from kitaru_zenml.journal.local import LocalStore
from kitaru_zenml_stacks import loopback

names = (f"store-{n}" for n in itertools.count())


def component(configuration: dict[str, Any]) -> Any:
    model = Client().create_stack_component(next(names), "s3", StackComponentType.ARTIFACT_STORE, configuration=configuration)
    return StackComponent.from_model(model)


def without_keys(s3: loopback.S3, **more: Any) -> dict[str, Any]:
    return {"path": f"{s3.uri}/some/prefix", "client_kwargs": json.dumps(s3.client_kwargs), **more}


def works(store: Any) -> None:
    probe_conditional(store)
    assert store.create("kitaru/r/x", b"1") is None
    assert store.list("kitaru/r/") == ["kitaru/r/x"]
    store.delete(["kitaru/r/x"])


def test_the_default_artifact_store_is_a_local_folder() -> None:
    store = open_store(Client().active_stack.artifact_store)
    assert isinstance(store, LocalStore)
    works(store)


def test_keys_of_the_component(moto: loopback.S3) -> None:
    store = open_store(component(moto.artifact_store_config("some/prefix")))
    assert store.uri == f"{moto.uri}/some/prefix"
    works(store)


def test_keys_of_a_zenml_secret(moto: loopback.S3) -> None:
    secret = next(names)
    Client().create_secret(secret, {"aws_access_key_id": moto.access_key, "aws_secret_access_key": moto.secret_key})
    works(open_store(component(without_keys(moto, authentication_secret=secret))))


def test_keys_and_endpoint_of_the_environment(moto: loopback.S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    works(open_store(component({"path": f"{moto.uri}/env"})))


def test_no_keys_anywhere_is_said(moto: loopback.S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "nowhere")
    with pytest.raises(StoreAccessDenied):
        open_store(component(without_keys(moto))).create("kitaru/r/x", b"1")


def test_credentials_that_expire_are_asked_for_again(moto: loopback.S3, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact_store, asked = component(moto.artifact_store_config("expiring")), []

    class Expiring(module._S3Credentials):
        def __call__(self) -> dict[str, Any]:
            asked.append(datetime.now(UTC))
            return {**super().__call__(), "token": f"session {len(asked)}", "expires_at": datetime.now(UTC)}

    monkeypatch.setattr(module, "_S3Credentials", Expiring)
    store = open_store(artifact_store)
    for i in range(4):
        store.create(f"kitaru/r/{i}", b"x")
    assert len(asked) >= 3


def test_session_keys_are_used_on_while_zenml_is_away(moto: loopback.S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH", timedelta(0))  # ask before every request
    artifact_store = component({**moto.artifact_store_config("away"), "token": "session"})
    store = open_store(artifact_store)
    assert store.create("kitaru/r/1", b"x") is None

    def away() -> Any:
        raise ConnectionError("the ZenML server does not answer")

    monkeypatch.setattr(artifact_store, "get_credentials", away)
    assert store.create("kitaru/r/2", b"x") is None


def test_a_flavor_that_cannot_write_conditionally_is_refused() -> None:
    class Odd:
        path, flavor = "hdfs://cluster/folder", "hdfs"

    with pytest.raises(StoreNotConditional, match="hdfs"):
        open_store(Odd())  # type: ignore[arg-type]


@pytest.mark.parametrize(("path", "kind"), [("gs://bucket/p", "GCSStore"), ("az://container/p", "AzureStore")])
def test_google_and_azure_go_through_the_same_class(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")

    class Cloud:
        flavor = "cloud"

        def __init__(self) -> None:
            self.path = path

        def get_credentials(self) -> None:
            return None

    store = open_store(Cloud())  # type: ignore[arg-type]
    assert type(store._client).__name__ == kind and store.uri == path  # type: ignore[attr-defined]
