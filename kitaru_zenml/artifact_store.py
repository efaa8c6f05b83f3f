"""The journal's store for a ZenML artifact store component: where its flavor, address and credentials become a `Store`.

Credentials come from the component (keys, ZenML secret, service connector), else from the environment as boto3 finds them, and are asked
for again before they expire: a long run outlives a session token.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kitaru_zenml.errors import StoreAccessDenied, StoreNotConditional
from kitaru_zenml.journal.local import LocalStore
from kitaru_zenml.journal.store import ObjectNotFound, Store

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

REFRESH = timedelta(minutes=5)  # how long credentials of a connector are used before they are asked for again


def open_store(artifact_store: BaseArtifactStore) -> Store:
    """The store of an artifact store component.

    Args:
        artifact_store: For example `Client().active_stack.artifact_store`.

    Raises:
        StoreNotConditional: If its flavor cannot create objects conditionally.
        StoreAccessDenied: If there are no credentials for it.
    """
    path = str(artifact_store.path)
    scheme, bucket, prefix = _split(path)
    if scheme in ("", "file"):
        return LocalStore(path.removeprefix("file://"))
    # obstore is imported late: it costs a tenth of a second that a local run need not pay. Its settings are typed dictionaries that
    # exist for type checkers only, hence `Any`.
    import obstore.store

    stores: Any = obstore.store

    from kitaru_zenml.journal.object_store import CLIENT_OPTIONS, ObjectStore, retry_options

    common = {"prefix": prefix or None, "client_options": CLIENT_OPTIONS, "retry_config": retry_options()}
    if scheme == "s3":
        config, options = _s3_config(artifact_store)
        common["client_options"] = {**CLIENT_OPTIONS, **options}
        client = stores.S3Store(bucket, config=config, credential_provider=_S3Credentials(artifact_store, path), **common)
    elif scheme == "gs":
        client = stores.GCSStore(bucket, **_gcs(artifact_store), **common)
    elif scheme in ("az", "abfs", "abfss"):
        client = stores.AzureStore(bucket, **_azure(artifact_store), **common)
    else:
        raise StoreNotConditional(path, f"the flavor `{artifact_store.flavor}` is not known to honour conditional writes")
    return ObjectStore(client, path)


def probe_conditional(store: Store) -> None:
    """Try on the store itself that an object is created only if it is absent.

    Raises:
        StoreNotConditional: If the second create of a name goes through, or the store cannot tell.
        StoreUnavailable: If the store cannot be written or read.
    """
    name = f"kitaru/_probe/{secrets.token_hex(8)}"
    try:
        first, second = b"first " + secrets.token_bytes(8), b"second " + secrets.token_bytes(8)
        if store.create(name, first) is not None:
            raise StoreNotConditional(store.uri, "it answers that a new object exists already")
        if store.create(name, second) != first:
            raise StoreNotConditional(store.uri, "it overwrote an object that existed")
        if store.get(name) != first:
            raise StoreNotConditional(store.uri, "it overwrote an object and said that it had not")
    except ObjectNotFound:
        raise StoreNotConditional(store.uri, "an object that was just created cannot be read") from None
    finally:
        store.delete([name])


def _split(path: str) -> tuple[str, str, str]:
    parts = urlsplit(path)
    return parts.scheme, parts.netloc.split("@")[0], parts.path.strip("/")


# --- S3 ------------------------------------------------------------------------------------------------------------------


def _s3_config(artifact_store: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Obstore's S3 and HTTP settings: endpoint and region of the component, else of the environment as boto3 finds them."""
    import boto3

    kwargs = dict(artifact_store.config.client_kwargs or {})
    region = kwargs.get("region_name") or artifact_store.get_credentials()[3] or boto3.session.Session().region_name
    config: dict[str, Any] = {"region": region or "us-east-1"}
    endpoint = kwargs.get("endpoint_url") or _endpoint_of_environment()
    options: dict[str, Any] = {}
    if endpoint:
        config |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
        options["allow_http"] = endpoint.startswith("http://")
    if kwargs.get("verify") is False:
        options["allow_invalid_certificates"] = True
    return config, options


def _endpoint_of_environment() -> str | None:
    import os

    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


class _S3Credentials:
    """Gives obstore credentials, and new ones when they expire."""

    def __init__(self, artifact_store: Any, uri: str) -> None:
        self._artifact_store, self._uri = artifact_store, uri
        self._chain: Any = None
        self._latest: tuple[Any, ...] | None = None

    def __call__(self) -> dict[str, Any]:
        try:
            self._latest = self._artifact_store.get_credentials()
        except Exception:
            # The ZenML server is away: a run goes on without it as long as what it gave last is valid, which the store decides.
            if self._latest is None:
                raise
        key, secret, token, _ = self._latest
        if key and secret:
            temporary = token is not None or self._artifact_store.connector is not None
            expires = datetime.now(UTC) + REFRESH if temporary else None
            return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": expires}
        return self._of_environment()

    def _of_environment(self) -> dict[str, Any]:
        import boto3

        if self._chain is None:
            self._chain = boto3.session.Session().get_credentials()
        if self._chain is None:
            raise StoreAccessDenied(
                self._uri,
                "find credentials",
                "neither the artifact store nor the environment has any: `zenml artifact-store update NAME --authentication_secret=...`",
            )
        frozen = self._chain.get_frozen_credentials()  # refreshes what expires
        expires = datetime.now(UTC) + REFRESH if frozen.token else None
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expires,
        }


# --- Google and Azure ----------------------------------------------------------------------------------------------------


def _gcs(artifact_store: Any) -> dict[str, Any]:
    """Credentials of a GCS artifact store: its connector or secret through google-auth, else the environment."""
    credentials = artifact_store.get_credentials()
    if credentials is None:
        return {}
    return {"credential_provider": _google_token(credentials)}


def _google_token(credentials: Any) -> Callable[[], dict[str, Any]]:
    def token() -> dict[str, Any]:
        import google.auth.transport.requests
        from google.oauth2 import service_account

        found = credentials
        if isinstance(found, dict):
            scope = "https://www.googleapis.com/auth/devstorage.read_write"
            found = service_account.Credentials.from_service_account_info(found, scopes=[scope])
        found.refresh(google.auth.transport.requests.Request())
        return {"token": found.token, "expires_at": found.expiry.replace(tzinfo=UTC) if found.expiry else None}

    return token


def _azure(artifact_store: Any) -> dict[str, Any]:
    """Credentials of an Azure artifact store: its secret or connector, else the environment."""
    secret = artifact_store.get_credentials()
    if secret is None:
        return {}
    values = secret.get_values() if hasattr(secret, "get_values") else secret.model_dump(exclude_none=True)
    names = {
        "account_name": "account_name", "account_key": "account_key", "sas_token": "sas_key", "client_id": "client_id",
        "client_secret": "client_secret", "tenant_id": "tenant_id",
    }  # fmt: skip
    return {"config": {ours: values[theirs] for theirs, ours in names.items() if values.get(theirs)}}
