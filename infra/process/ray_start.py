"""What Ray needs to start or to be reached: a token, loopback or not, a quiet stderr, and errors with their cause."""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import IO, cast

from infra.errors import ClusterError, all_of

# Ray reads it when it is imported. At "0" a cluster listens on loopback alone, which is its default on macOS.
ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def use_token() -> None:
    """Let Ray send the user's token where there is one: it does not look for it by
    default when it attaches to a running cluster. To be called before Ray is imported."""
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _has_token() -> bool:
    token_file = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    return "RAY_AUTH_TOKEN" in os.environ or os.path.isfile(token_file)


@cache
def _own_token() -> str:
    """Of the clusters that this process starts; one for all, since Ray's core reads it once."""
    return secrets.token_hex(16)


@contextmanager
def local_token() -> Iterator[None]:
    """Guard a cluster that is started in the block by a token in the environment: Ray would write one below HOME, which
    may be absent or read-only."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or _has_token():
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = _own_token()
    try:
        yield
    finally:
        os.environ.pop("RAY_AUTH_TOKEN", None)


def only_on_loopback(address: str) -> bool:
    """Whether a cluster here listens on loopback alone, as those that `ray_cluster` starts do: Ray would look for it at
    this machine's outer address."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it asks for the route
            socket.create_connection((probe.getsockname()[0], int(port)), 5).close()
        except (OSError, ValueError):
            return True
    return False


@contextmanager
def without_log_level() -> Iterator[None]:
    """Keep the lines that name Ray's log level out of what the block writes to stderr. The filter is another process,
    so that the last words of a Ray that aborts this one are seen."""
    sys.stderr.flush()
    stderr = os.dup(2)
    command = ["grep", "--line-buffered", "-v", "Set ray log level from environment"]
    filtering = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr, start_new_session=True)
    ours = cast(IO[bytes], filtering.stdin)
    os.dup2(ours.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        ours.close()
        with suppress(subprocess.TimeoutExpired):  # one of Ray's processes may keep it open
            filtering.wait(1)


def not_started(error: Exception, address: str | None) -> ClusterError:
    if not address:
        logs = os.path.join(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
        return ClusterError(
            f"Ray did not start ({all_of(error)})",
            where="this machine",
            todo=f"correct the cause that is named; Ray's own logs are in {logs}, RAY_TMPDIR moves them",
        )
    token = "; RAY_AUTH_MODE=disabled for one without tokens" if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    return ClusterError(
        f"Ray cannot be reached ({all_of(error)})",
        where=address,
        todo=f"check the address and that the cluster runs, or leave it empty for a local one{token}",
    )
