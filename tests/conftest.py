"""Fixtures of all tests, started on first use: an S3 server in its own process, an MLflow server in a thread."""

import gc
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

from infra.files import storage
from infra.mlflow.server import TrackingConfig

# How long an example takes says how busy the machine is, not whether it is right.
settings.register_profile("ccsr", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ccsr")

# Two lanes share the cores: a thread each, and workers of Ray that are not put behind everything else.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so Ray spells it
# Of every Ray that the tests start, in place of the user's own. Ray's core reads it once in a process.
os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)

S3_SETTINGS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_syncs() -> Iterator[None]:
    """Replace os.fsync in this process: no test has to survive a power cut. A wrong descriptor still fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a moto server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **S3_SETTINGS},
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def bucket(s3_server: str) -> Iterator[str]:
    """A bucket that infra.files.storage is connected to; the environment is set for the time of connecting alone."""
    storage.s3_filesystem.cache_clear()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**S3_SETTINGS, "AWS_ENDPOINT_URL": s3_server}.items():
            environment.setenv(name, value)
        storage.s3_filesystem().mkdir("bucket")
    yield "s3://bucket"
    storage.s3_filesystem.cache_clear()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between attempts at a storage server, noted instead of spent. `time.sleep` itself stays: a
    background thread that polls would spin on anything quicker."""
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def s3(bucket: str) -> str:
    """An empty place on S3."""
    return f"{bucket}/{os.urandom(6).hex()}"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as MLflow makes it, to be copied: its migrations take a second of each new one."""
    from mlflow.tracking import MlflowClient

    place = tmp_path_factory.mktemp("migrated") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.parent)  # the artifacts of MLflow's default experiment belong there
        MlflowClient(f"sqlite:///{place}").search_experiments(max_results=1)
    return place


@pytest.fixture
def database(migrated: Path, tmp_path: Path) -> str:
    """The address of an MLflow database without a run, `mlflow.db` in the test's folder."""
    return f"sqlite:///{shutil.copy(migrated, tmp_path)}"


@pytest.fixture(scope="module")
def store(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingConfig]:
    """MLflow's own server, in a thread of this process: a separate process takes a minute to start."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(migrated, folder)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", "")  # the server sets it in its process
        environment.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{folder}/mlflow.db")
        environment.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        environment.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", f"{folder}/artifacts")
        environment.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        environment.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        environment.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        environment.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        from mlflow.server import app
        from werkzeug.serving import make_server

        server = make_server("127.0.0.1", 0, app, threaded=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield TrackingConfig(uri=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        server.server_close()
