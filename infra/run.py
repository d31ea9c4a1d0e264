"""run.json: what an output folder was made from; a resume under anything else is refused with a diff."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infra.config import Config, difference, fingerprint_of, library_versions, result_part
from infra.errors import ConfigError
from infra.storage import ensure_writable, exists, join, put_if_absent, read_json


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
