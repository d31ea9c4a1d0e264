"""Run a `ccsr` command as a Ray job on a cluster: our packages and the named config travel, the logs come back."""

import asyncio
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.errors import ClusterError, ConfigError

PACKAGES = ("infra", "degradation", "training", "evaluation", "pipelines")
# Addresses travel with a job; credentials do not: a job's environment can be read by everyone on the cluster.
PASSED_ON = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
COMMANDS = ("shard", "verify", "train", "evaluate", "compare", "restore")


def submit(address: str | None, arguments: Sequence[str], on_log: Callable[[str], None]) -> int:
    """Submit `ccsr ARGUMENTS`, hand its log lines to `on_log` until it ends, and return its exit code (0 or 1).

    Raises ConfigError for a command that is not one of COMMANDS, ClusterError if the cluster cannot be reached.
    """
    if not arguments or arguments[0] not in COMMANDS:
        raise ConfigError(
            f"`ccsr {' '.join(arguments[:1])}` cannot be submitted",
            where="the words after --",
            todo=f"submit one of: {', '.join(COMMANDS)}",
        )
    with tempfile.TemporaryDirectory(prefix="ccsr-submit-") as folder:
        shipped = _ship_configs(arguments, Path(folder))
        client = _client(address)
        root = Path(__file__).parent.parent
        job = _start(
            client,
            entrypoint=f"python -m pipelines.cli {shlex.join(shipped)}",
            runtime_env={
                "working_dir": folder,
                "py_modules": [str(root / name) for name in PACKAGES],
                "env_vars": {name: os.environ[name] for name in PASSED_ON if name in os.environ},
            },
        )
        on_log(f"job {job} on {client.get_address()}\n")
        asyncio.run(_follow(client, job, on_log))
        return 0 if str(client.get_job_status(job)) == "SUCCEEDED" else 1


def _ship_configs(arguments: Sequence[str], folder: Path) -> list[str]:
    """The arguments with each config file replaced by its copy's name in `folder`."""
    shipped = list(arguments)
    for index, argument in enumerate(arguments[1:], start=1):
        if arguments[index - 1] in ("-c", "--config"):
            if not Path(argument).is_file():
                raise ConfigError("there is no such config file", where=argument, todo="check the path given to -c")
            shipped[index] = Path(argument).name
            shutil.copyfile(argument, folder / Path(argument).name)
    return shipped


def _start(client: Any, **job: Any) -> str:
    """Submit the job; a head that is up but whose nodes have not registered yet is given a minute."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError(
                    f"the cluster did not take the job ({str(error).splitlines()[0][:200]})",
                    where=client.get_address(),
                    todo="look at the cluster's dashboard, then submit again",
                ) from error
        time.sleep(1)


def _client(address: str | None) -> Any:
    token_file = os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or Path(token_file).is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's job client does not look for a token unless told
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    place = address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    try:
        return JobSubmissionClient(place)
    except AuthenticationError as error:
        raise ClusterError(
            "the cluster refused us: its token is missing or wrong",
            where=place,
            todo="put the cluster's token into ~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN",
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"the cluster's job server does not answer ({str(error).splitlines()[0][:200]})",
            where=place,
            todo="check the address (the dashboard's, usually port 8265) and the tunnel to it",
        ) from error


async def _follow(client: Any, job: str, on_log: Callable[[str], None]) -> None:
    async for lines in client.tail_job_logs(job):
        on_log(lines)
