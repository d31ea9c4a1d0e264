"""Run a `ccsr` command as a Ray job on a cluster: our packages and the named config travel, the logs come back."""

import hashlib
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from infra.cluster.server import check_version, cluster_facts, connect
from infra.display.progress import last_line
from infra.errors import PASSWORD, ClusterError, ConfigError, StorageError, line_of
from infra.files.locations import local_path
from infra.files.publish import ensure_writable, temporary_folder
from infra.files.storage import is_s3
from infra.process.ray_runtime import check_gpus
from infra.run import COMMIT, PACKAGES, ROOT, git_commit

COMMANDS = ("shard", "verify", "train", "evaluate", "compare", "restore", "doctor")
# Addresses travel with a job; credentials do not: a job's environment can be read by everyone on the cluster.
PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "CCSR_WEIGHTS",
)
STOP_SECONDS = 600
STOPPED = 143
ENDED = "ccsr ended with exit code "
"""A job's last line begins so: Ray keeps no exit code of a job that was asked to stop, though its work may be done."""


@dataclass(frozen=True)
class Need:
    """What a command will take: GPUs, places to write to, and what its user should know beforehand."""

    num_gpus: int = 0
    outputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def submit(
    address: str | None,
    arguments: Sequence[str],
    on_log: Callable[[str], None],
    *,
    need: Need = Need(),
    key: str | None = None,
    image: bool = False,
    dry_run: bool = False,
) -> tuple[Any, str | None]:
    """Start `ccsr ARGUMENTS` as a job unless the same one runs or succeeded; returns the client and the job's id, None
    where it has succeeded before.

    The same: equal arguments, config and packages, or an equal `key`. After a failed or stopped attempt the next one
    is started. `image`: the packages that are installed on the nodes are used, nothing but the config travels.
    `dry_run`: only the checks, and a line about the job; nothing is sent or written.
    Before anything starts: ConfigError for what cannot be submitted, ClusterError for a cluster that cannot be reached,
    runs another Ray or has too few GPUs, StorageError for an output that this machine may not write to.
    """
    if not arguments or arguments[0] not in COMMANDS:
        raise ConfigError(
            f"`ccsr {' '.join(arguments[:1])}` cannot be submitted",
            where="the words after --",
            todo=f"submit one of: {', '.join(COMMANDS)}",
        )
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    with temporary_folder("submit") as folder:
        shipped = ship_configs(arguments, folder)
        refuse_passwords([*shipped, *environment.values(), *(file.read_text() for file in folder.iterdir())])
        client = connect(address)
        where = client.get_address()
        facts = cluster_facts(client)
        check_version(facts, where)
        check_gpus(need.num_gpus, facts.gpus, where)
        for note in (*need.notes, *_unwritable(() if dry_run else need.outputs)):
            on_log(f"note: {note}\n")
        name = f"ccsr-{arguments[0]}-{submission_identity(shipped, folder, key, image)}"
        if dry_run:
            last, newest = _last_attempt(client, name)
            found = f"{last.id} is {last.status}" if last else f"{name}-{newest + 1} would be new"
            on_log(f"dry run: `ccsr {shlex.join(shipped)}` on {where}, {need.num_gpus} GPUs; {found}\n")
            return client, None
        if not image:
            environment[COMMIT] = git_commit()
            for package in PACKAGES:
                shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        job = start_once(
            client,
            name,
            on_log,
            entrypoint=f"exec python -m pipelines.cli.main {shlex.join(shipped)}",
            runtime_env={
                "working_dir": str(folder),
                # A training run that is stopped writes a checkpoint first; Ray would kill it after 3 seconds.
                "env_vars": environment | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
            },
        )
        if job is not None:
            on_log(f"job {job} on {where}\n")
        return client, job


def ship_configs(arguments: Sequence[str], folder: Path) -> list[str]:
    """The arguments with each config file replaced by its copy's name in `folder`."""
    shipped = list(arguments)
    for index, argument in enumerate(arguments):
        before = arguments[index - 1] if index else ""
        prefix = next((text for text in ("--config=", "-c") if argument.startswith(text) and argument != text), "")
        if prefix or before in ("-c", "--config"):
            path = argument.removeprefix(prefix)
            if not local_path(path).is_file():
                raise ConfigError("there is no such config file", where=path, todo="check the path given to -c")
            shipped[index] = prefix + Path(path).name
            shutil.copyfile(local_path(path), folder / Path(path).name)
    return shipped


def refuse_passwords(texts: Sequence[str]) -> None:
    for text in texts:
        found = PASSWORD.search(text)
        if found:
            host = (text[found.end() :].split() or [""])[0][:80]
            raise ConfigError(
                "an address contains a password; jobs and their settings can be read by everyone on the cluster",
                where=f"the address of {host}",
                todo="leave it out and give it to the nodes: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in a Kubernetes secret or the nodes' environment",
            )


def _unwritable(outputs: Sequence[str]) -> list[str]:
    """Try to write to each bucket; returns what could not be tried from here."""
    notes = []
    for output in filter(is_s3, outputs):
        try:
            ensure_writable(output)
        except StorageError as error:
            if "no S3 credentials" not in error.what:
                raise
            notes.append(f"without S3 credentials here {output} is first tried by the job, with the nodes' own")
    return notes


def submission_identity(shipped: Sequence[str], folder: Path, key: str | None, image: bool) -> str:
    """What makes two submits the same one, as 12 hex digits."""
    if key is not None:
        return hashlib.sha256(key.encode()).hexdigest()[:12]
    files = sorted(folder.iterdir())
    if not image:
        every = (file for name in PACKAGES for file in (ROOT / name).rglob("*") if "__pycache__" not in file.parts)
        files += sorted(file for file in every if file.is_file())
    digest = hashlib.sha256(repr((list(shipped), image)).encode())
    for file in files:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _last_attempt(client: Any, name: str) -> "tuple[JobRow | None, int]":
    """The newest job called NAME-N, and N; 0 where there is none."""
    attempts = {
        int(found[1]): one
        for one in client.list_jobs()
        if (found := re.fullmatch(rf"{re.escape(name)}-(\d+)", one.submission_id or ""))
    }
    newest = max(attempts, default=0)  # not how many there are: one may have been deleted
    return (_row(client, attempts[newest]) if attempts else None), newest


def start_once(client: Any, name: str, on_log: Callable[[str], None], **job: Any) -> str | None:
    """The id of the attempt that runs, else of a new one; None where one succeeded. Of racing submits one starts it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            last, newest = _last_attempt(client, name)
            if last and last.exit_code == 0:
                when = datetime.fromtimestamp(last.ended or 0).isoformat(" ", "seconds")
                on_log(f"{last.id} succeeded at {when}; --key NAME forces a new job, `ccsr jobs logs` has its log\n")
                return None
            if last and last.exit_code is None:
                on_log(f"{last.id} was submitted before and is {last.status}\n")
                return last.id
            return client.submit_job(submission_id=f"{name}-{newest + 1}", **job)
        except (RuntimeError, OSError) as error:
            # A head that is up but whose nodes have not registered yet is given a minute. "Exists" is another submit,
            # or our own whose answer was lost: the list tells.
            passing = ("No available agent", "already exists")
            if not any(text in str(error) for text in passing) or time.monotonic() > deadline:
                raise ClusterError(
                    f"the cluster did not take the job ({line_of(error)})",
                    where=client.get_address(),
                    todo="look at the cluster's dashboard, then submit again",
                ) from error
        time.sleep(1)


def job_info(client: Any, job: str) -> Any:
    """A job's facts. ClusterError where the cluster does not know it."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        raise ClusterError(
            "the cluster knows no such job (a head that was started anew forgets them)",
            where=f"{client.get_address()}: {job}",
            todo="see `ccsr jobs list`; submitting the same command again resumes",
        ) from error


def exit_code(client: Any, info: Any) -> int:
    """A finished job's exit code: its driver's own, 6 where the driver did not run to an end. One that was asked to
    stop has 143, or 0 where its work was done before it ended."""
    if str(info.status) == "SUCCEEDED":
        return 0
    if str(info.status) == "STOPPED":
        return 0 if client.get_job_logs(info.submission_id).rpartition(ENDED)[2].strip() == "0" else STOPPED
    code = info.driver_exit_code
    return ClusterError.exit_code if not code else code if code > 0 else 128 - code


@dataclass(frozen=True)
class JobRow:
    """One job of `ccsr jobs list`. Times in seconds since 1970, None for not yet. `progress`: of `job_status`, the last
    line of progress of a job that runs."""

    id: str
    status: str
    began: float | None
    ended: float | None
    exit_code: int | None
    command: str
    message: str
    progress: str = ""


def _row(client: Any, info: Any) -> JobRow:
    return JobRow(
        id=info.submission_id,
        status=str(info.status),
        began=info.start_time and info.start_time / 1000,
        ended=info.end_time and info.end_time / 1000,
        exit_code=exit_code(client, info) if info.status.is_terminal() else None,
        command=info.entrypoint.replace("exec python -m pipelines.cli.main", "ccsr"),
        message=info.message or "",
    )


def list_jobs(client: Any) -> list[JobRow]:
    """The submitted jobs that the cluster remembers, the newest last."""
    infos = [info for info in client.list_jobs() if info.submission_id]
    return [_row(client, info) for info in sorted(infos, key=lambda info: info.start_time or 0)]


def job_status(client: Any, job: str) -> JobRow:
    row = _row(client, job_info(client, job))
    return row if row.exit_code is not None else replace(row, progress=last_line(client.get_job_logs(job)))


def stop(client: Any, job: str) -> bool:
    """Ask a job to end: SIGTERM to its driver, SIGKILL ten minutes later. False if it had ended before."""
    if job_info(client, job).status.is_terminal():
        return False
    return bool(client.stop_job(job))
