"""MLflow's server in a separate process: on sqlite or Postgres, with artifact proxy, with or without passwords."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.training_runs import free_port

USER, PASSWORD = "admin", "correct horse"
POSTGRES = ("initdb", "pg_ctl", "postgres")


class Server:
    """`mlflow server` on `database`; with `passwords` only USER with PASSWORD may read or write."""

    def __init__(self, folder: Path, database: str, *, passwords: bool) -> None:
        self.artifacts, self._log = folder / "artifacts", folder / "server.log"
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        places = ["--backend-store-uri", database, "--artifacts-destination", str(self.artifacts), "--serve-artifacts"]
        address = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        self._command = [sys.executable, "-m", "mlflow", "server", *places, *address]
        self._environment = {**os.environ, "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret"}
        self._environment.pop("MLFLOW_TRACKING_URI", None)
        if passwords:
            settings = folder / "auth.ini"
            settings.write_text(
                f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder}/users.db\n"
                f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            self._command += ["--app-name", "basic-auth"]
            self._environment["MLFLOW_AUTH_CONFIG_PATH"] = str(settings)

    def start(self) -> None:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=10).close()
                return
            except OSError:
                words = self._log.read_text()[-3000:]
                assert self._process.poll() is None, words
                assert time.monotonic() < deadline, words
                time.sleep(0.2)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def postgres() -> Iterator[str]:
    """The address of an empty database. Postgres runs as another user where this one is root."""
    missing = [name for name in POSTGRES if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} on this machine")
    user = "nobody" if os.getuid() == 0 else None
    folder, port = Path(tempfile.mkdtemp(prefix="ccsr-postgres-")), free_port()

    def call(*command: object) -> None:
        subprocess.run(
            [str(word) for word in command], user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=300
        )

    try:
        if user:
            shutil.chown(folder, user)
        call("initdb", "--pgdata", folder / "data", "--username", "mlflow", "--auth", "trust")
        options = f"-k {folder} -p {port} -c listen_addresses=127.0.0.1"
        call("pg_ctl", "start", "--wait", "-D", folder / "data", "-o", options, "--log", folder / "log")
        try:
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "stop", "--wait", "-D", folder / "data", "--mode", "immediate")
    finally:
        shutil.rmtree(folder)
