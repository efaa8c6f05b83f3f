"""Services on loopback for demos, benchmarks and tests: an S3 endpoint (moto's server, or Ceph's gateway) and a ZenML server over REST.

Each is a context manager that starts processes of its own on free ports and stops them, also when this process dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


class Unavailable(Exception):
    """A service cannot run on this machine; the message says what to install."""


@dataclass(frozen=True)
class S3:
    """An S3 endpoint with a bucket."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    @property
    def uri(self) -> str:
        """The bucket as a ZenML artifact store path."""
        return f"s3://{self.bucket}"

    @property
    def client_kwargs(self) -> dict[str, str]:
        """What boto3 and s3fs need besides the keys."""
        return {"endpoint_url": self.endpoint, "region_name": "us-east-1"}

    def artifact_store_config(self, prefix: str = "") -> dict[str, Any]:
        """Configuration of a ZenML artifact store of flavor `s3` in this bucket."""
        path = f"{self.uri}/{prefix}".rstrip("/")
        return {
            "path": path,
            "key": self.access_key,
            "secret": self.secret_key,
            "client_kwargs": json.dumps(self.client_kwargs),
        }

    @property
    def env(self) -> dict[str, str]:
        """The same by environment variables, as boto3 reads them."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def with_bucket(self, bucket: str) -> S3:
        """The same endpoint with another bucket, which is created."""
        import boto3

        keys = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key}
        boto3.client("s3", **self.client_kwargs, **keys).create_bucket(Bucket=bucket)
        return S3(self.endpoint, self.access_key, self.secret_key, bucket)


@dataclass(frozen=True)
class Server:
    """A ZenML server over REST."""

    url: str
    api_key: str
    password: str = ""  # of user `default`, for its dashboard

    def client_env(self, config: Path) -> dict[str, str]:
        """Environment of a client process with a ZenML configuration folder of its own that talks to this server."""
        config.mkdir(parents=True, exist_ok=True)
        return {"ZENML_CONFIG_PATH": str(config), "ZENML_STORE_URL": self.url, "ZENML_STORE_API_KEY": self.api_key}


@contextlib.contextmanager
def moto_s3(bucket: str = "kitaru") -> Iterator[S3]:
    """An S3 server by moto: in memory, with conditional writes."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with process(command) as server:
        await_http(f"http://127.0.0.1:{port}/moto-api/", server)
        yield S3(f"http://127.0.0.1:{port}", "test", "test", "").with_bucket(bucket)


@contextlib.contextmanager
def zenml_server(folder: Path, port: int | None = None) -> Iterator[Server]:
    """A real ZenML server with its own SQLite database below `folder`, its default user activated and onboarded.

    A second one on the same folder and port is the same server, started again.
    """
    port = port or free_port()
    (folder / "config").mkdir(parents=True, exist_ok=True)
    password = secrets.token_urlsafe(12)
    env = {name: value for name, value in os.environ.items() if not name.startswith("ZENML_")}
    env |= {
        "ZENML_CONFIG_PATH": str(folder / "config"),
        "ZENML_SERVER_DEPLOYMENT_TYPE": "other",
        "ZENML_SERVER_AUTO_ACTIVATE": "true",
        "ZENML_DEFAULT_USER_NAME": "default",
        "ZENML_DEFAULT_USER_PASSWORD": password,
        "ZENML_ANALYTICS_OPT_IN": "false",
        "ZENML_SERVER_DISPLAY_ANNOUNCEMENTS": "false",
        "ZENML_SERVER_DISPLAY_UPDATES": "false",
        "ZENML_LOGGING_VERBOSITY": "WARN",
        "ZENML_SERVER_RATE_LIMIT_ENABLED": "false",
    }
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "zenml.zen_server.zen_server_api:app",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    url = f"http://127.0.0.1:{port}"
    with process([*command, "--log-level", "warning"], env=env, log=folder / "server.log") as server:
        await_http(f"{url}/health", server, seconds=90, log=folder / "server.log")
        kept = folder / "server.json"
        if not kept.exists():
            kept.write_text(json.dumps({"api_key": _service_key(url, password), "password": password}))
        yield Server(url, **json.loads(kept.read_text()))


def _service_key(url: str, password: str) -> str:
    """Log in as the default user, end its onboarding, and make a service account with an API key."""
    form = f"username=default&password={password}".encode()
    token = json.loads(_request(f"{url}/api/v1/login", form, {"Content-Type": "application/x-www-form-urlencoded"}))[
        "access_token"
    ]
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    onboarded = {"email_opted_in": False, "user_metadata": {"finished_onboarding_survey": True, "overview_tour_done": True}}
    _request(f"{url}/api/v1/current-user", json.dumps(onboarded).encode(), headers, "PUT")
    account = json.loads(
        _request(f"{url}/api/v1/service_accounts", json.dumps({"name": "kitaru", "active": True}).encode(), headers)
    )
    key = _request(f"{url}/api/v1/service_accounts/{account['id']}/api_keys", json.dumps({"name": "kitaru"}).encode(), headers)
    return str(json.loads(key)["body"]["key"])


def _request(url: str, data: bytes, headers: dict[str, str], method: str = "POST") -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=30) as answer:
        return bytes(answer.read())


# --- Ceph ----------------------------------------------------------------------------------------------------------------

_CEPH = ("ceph", "ceph-mon", "ceph-mgr", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool")
_CEPH_CONF = """\
[global]
fsid={fsid}
mon_host=v1:{mon}
public_addr=127.0.0.1
cluster_addr=127.0.0.1
ms_bind_msgr2=false
ms_bind_port_min={low}
ms_bind_port_max={high}
auth_cluster_required=none
auth_service_required=none
auth_client_required=none
osd_pool_default_size=1
osd_pool_default_min_size=1
osd_pool_default_pg_num=8
mon_warn_on_pool_no_redundancy=false
mon_allow_pool_size_one=true
osd_crush_chooseleaf_type=0
osd_objectstore=memstore
memstore_device_bytes=2147483648
run_dir={folder}/run
admin_socket={folder}/run/$name.asok
pid_file={folder}/run/$name.pid
log_file={folder}/$name.log
mon_data={folder}/mon
mgr_data={folder}/mgr
osd_data={folder}/osd
rgw_data={folder}/rgw
rgw_frontends=beast endpoint=127.0.0.1:{port} tcp_nodelay=1
"""


@contextlib.contextmanager
def ceph_s3(folder: Path, bucket: str = "kitaru") -> Iterator[S3]:
    """Ceph's S3 gateway over a one-node cluster in memory: an S3 that is not a test double. Up in about twelve seconds.

    Raises:
        Unavailable: If Ceph's programs are not installed.
    """
    if missing := [name for name in _CEPH if shutil.which(name) is None]:
        packages = "ceph-mon ceph-mgr ceph-osd radosgw ceph-common"
        raise Unavailable(
            f"Ceph's {missing[0]} is not installed; on Debian: apt-get install --no-install-recommends {packages}"
        )
    for name in ("mon", "mgr", "osd", "rgw", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    port, mon, low = free_port(), f"127.0.0.1:{free_port()}", 20_000 + os.getpid() % 300 * 100
    fsid = str(uuid.uuid4())
    conf = folder / "ceph.conf"
    conf.write_text(_CEPH_CONF.format(fsid=fsid, mon=mon, folder=folder, port=port, low=low, high=low + 99))
    given = ["-c", str(conf)]

    def run(*command: str, seconds: int = 60) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])} failed: {done.stderr[-800:]}")

    with contextlib.ExitStack() as daemons:

        def start(*command: str) -> subprocess.Popen[bytes]:
            return daemons.enter_context(process([*command, "-f", *given], log=folder / f"{command[0]}.out"))

        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:{mon}]", str(folder / "monmap"))
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"), *given)
        start("ceph-mon", "-i", "a")
        run("ceph", *given, "--connect-timeout", "30", "-s")
        start("ceph-mgr", "-i", "a")
        run("ceph", *given, "osd", "new", fsid, "0")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", fsid, "--monmap", str(folder / "monmap"), *given)
        for _ in range(8):  # it gives up if it speaks before it has the monitor's map ("wrong fsid")
            osd = start("ceph-osd", "-i", "0")
            if _is_up(osd, given):
                break
        user = ["user", "create", "--uid=test", "--display-name=test", "--access-key=k", "--secret-key=s"]
        run("radosgw-admin", *given, *user, seconds=120)
        gateway = start("radosgw", "-n", "client.rgw")
        await_http(f"http://127.0.0.1:{port}/", gateway, seconds=60, log=folder / "radosgw.out")
        yield S3(f"http://127.0.0.1:{port}", "k", "s", "").with_bucket(bucket)


def _is_up(osd: subprocess.Popen[bytes], given: list[str]) -> bool:
    for _ in range(60):
        if osd.poll() is not None:
            return False
        stat = subprocess.run(["ceph", *given, "osd", "stat", "--format", "json"], capture_output=True, text=True, timeout=60)
        if stat.returncode == 0 and json.loads(stat.stdout)["num_up_osds"]:
            return True
        time.sleep(0.3)
    return False


# --- processes -----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(
    command: list[str], env: dict[str, str] | None = None, log: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that ends with this block, or with this process."""
    with contextlib.ExitStack() as files:
        out = files.enter_context(log.open("ab")) if log else subprocess.DEVNULL
        child = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=_die_with_parent
        )
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def await_http(url: str, server: subprocess.Popen[bytes], seconds: float = 30, log: Path | None = None) -> None:
    """Wait until an HTTP server answers anything.

    Raises:
        RuntimeError: If it ends or does not answer in time, with the end of its log.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            pass
        if server.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-1500:] if log and log.exists() else ""
            raise RuntimeError(f"the server at {url} did not come up: {said}")
        time.sleep(0.1)
