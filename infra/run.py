"""run.json: what an output folder was made from, code included; a resume under anything else is refused with a diff."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infra.config import Config, difference, fingerprint_of, library_versions, result_part
from infra.errors import ConfigError
from infra.files.publish import ensure_writable, put_if_absent, write_bytes
from infra.files.storage import exists, join, list_files, read_json, remove

PACKAGES = ("infra", "degradation", "training", "evaluation", "pipelines")
ROOT = Path(__file__).parents[1]
"""The folder of our packages."""
MAX_SHOWN = 8
MLFLOW_FILE = "mlflow.json"
"""Names the MLflow run of an output: `output`, `run_id`, `experiment`. A copy of the folder is another output."""
COMMIT = "CCSR_GIT_COMMIT"
"""Names the commit of code that `ccsr submit` has shipped."""


def claim_output(
    output: str,
    config: Config,
    *,
    job: str,
    inputs: Mapping[str, Any],
    libraries: Sequence[str],
    facts: Mapping[str, Any] | None = None,
    name: str = "run.json",
    write: bool = True,
) -> dict[str, Any]:
    """Write OUT/`name`, or check that the one there describes the same result; returns its content. One that nothing
    was made from yet is replaced.

    `inputs` identifies what the job reads (dataset ids, a hash of the source list or checkpoint); `facts` are further
    top-level entries that depend on the same. Without `write` it only checks.
    Raises ConfigError with the differing keys, StorageError if nothing can be written there.
    """
    depends_on = {
        "config": result_part(config),
        "inputs": dict(inputs),
        "libraries": library_versions(*libraries),
        **(facts or {}),
    }
    depends_on = json.loads(json.dumps(depends_on))
    run = {"job": job, "fingerprint": fingerprint_of(depends_on), **depends_on}
    place, content = join(output, name), json.dumps(run, indent=2, sort_keys=True).encode()
    if not exists(place):
        if not write:
            return run
        ensure_writable(output)
        put_if_absent(place, content)
    present = read_json(place)
    if present.get("fingerprint") == run["fingerprint"]:
        return present
    _refuse_other(output, present, {**run, "fingerprint": present.get("fingerprint")})
    if write:
        if exists(join(output, MLFLOW_FILE)):  # of the start that failed: parameters of an MLflow run never change
            remove(join(output, MLFLOW_FILE))
        write_bytes(place, content)
    return run


class Progress(NamedTuple):
    """What a job would do: `done` of `total` are in its output; `reads` and `what` are for people; `flops`: of the
    networks in all, 0 where others take the time."""

    done: int
    total: int
    unit: str
    reads: str
    what: str
    flops: float = 0.0


def check_config(output: str, result: Mapping[str, Any], *, job: str) -> None:
    """ConfigError where OUT holds the work of another job, or of a config that differs in what `result` names of its
    `result_part`: the part of `claim_output` that needs neither the inputs nor the machines that will do the work."""
    if exists(join(output, "run.json")):
        run, result = read_run(output), json.loads(json.dumps(result))
        present = {name: value for name, value in run["config"].items() if name in result}
        _refuse_other(output, {"job": run["job"], "config": present}, {"job": job, "config": result})


def _refuse_other(output: str, present: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ConfigError where they differ and OUT holds work: run.json alone is left by a start that failed before any."""
    changes = difference(present, wanted)
    if changes and has_work(output):
        more = [f"and {len(changes) - MAX_SHOWN} more"] if len(changes) > MAX_SHOWN else []
        raise ConfigError(
            "this output was made from something else:",
            where=join(output, "run.json"),
            todo="give another `output`, or restore the old config to resume this one",
            items=[*changes[:MAX_SHOWN], *more],
        )


def has_work(output: str) -> bool:
    """Whether a job has made something in OUT: a file beside run.json, hidden ones and MLflow's own apart."""
    names = (place.removeprefix(join(output, "")) for place in list_files(output))
    return any(name != "run.json" and not name.startswith((".", "mlflow.", "mlartifacts/")) for name in names)


def check_claim(output: str, fingerprint: str) -> None:
    """ConfigError where another job has replaced the run.json that this one began with."""
    if exists(join(output, "run.json")) and read_run(output).get("fingerprint") != fingerprint:
        raise ConfigError(
            "another config has begun to use this output",
            where=join(output, "run.json"),
            todo="stop one of the two jobs and give it another `output`",
        )


def read_run(output: str) -> dict[str, Any]:
    """The content of OUT/run.json."""
    return read_json(join(output, "run.json"))


def git_commit() -> str:
    """The commit that holds this code, with "-dirty" where our packages differ from it; "unknown" where the code is in
    no commit: outside a checkout, or installed below another project's."""
    if COMMIT in os.environ:
        return os.environ[COMMIT]
    # A hook or a script may have set the variables that name another repository.
    others = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    environment = {name: value for name, value in os.environ.items() if name not in others}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", "infra")
        commit = git("rev-parse", "--verify", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--", *PACKAGES) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
