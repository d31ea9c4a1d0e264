"""run.json: what an output folder was made from, code included; a resume under anything else is refused with a diff."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.config import Config, difference, fingerprint_of, library_versions, result_part
from infra.errors import ConfigError
from infra.publish import ensure_writable, put_if_absent
from infra.storage import exists, join, read_json

PACKAGES = ("infra", "degradation", "training", "evaluation", "pipelines")
ROOT = Path(__file__).parents[1]
"""The folder of our packages."""
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
) -> dict[str, Any]:
    """Write OUT/`name`, or check that the one there describes the same result; returns its content.

    `inputs` identifies what the job reads (dataset ids, a hash of the source list or checkpoint); `facts` are further
    top-level entries that depend on the same.
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
    place = join(output, name)
    if not exists(place):
        ensure_writable(output)
        put_if_absent(place, json.dumps(run, indent=2, sort_keys=True).encode())
    present = read_json(place)
    if present.get("fingerprint") != run["fingerprint"]:
        changes = difference(present, {**run, "fingerprint": present.get("fingerprint")})
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        raise ConfigError(
            f"this output was made from something else: {shown}",
            where=place,
            todo="give another `output`, or restore the old config to go on with this one",
        )
    return present


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
