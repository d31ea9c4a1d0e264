"""Names as MLflow takes and shows them: a run's, its parameters', its pictures'."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from infra.files.storage import name_of
from infra.shards.keys import bounded, with_digest

MAX_IMAGE_KEY = 100  # MLflow adds as many characters again, and file systems allow 255


def run_name(run: Mapping[str, Any], output: str | None) -> str:
    """The output's last folder, with the stage where that does not name it; without output the job and a hash."""
    if output is None:
        return f"{run['job']}-{run['fingerprint'][:8]}"
    folder, stage = name_of(output), f"stage{run['config'].get('stage')}"
    return folder if "stage" not in run["config"] or stage in folder else f"{folder}-{stage}"


def flatten(values: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as one level with dotted keys, as `--set` takes them."""
    flat: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        inner = value if isinstance(value, list | tuple) else ()
        if isinstance(value, Mapping) or any(isinstance(one, Mapping) for one in inner):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def image_key(key: str) -> str:
    """A picture's key, in which what MLflow refuses becomes `-`."""
    plain = re.sub(r"[^\w./ -]+", "-", key, flags=re.ASCII)
    return bounded(plain, key, MAX_IMAGE_KEY) if plain == key else with_digest(plain[:MAX_IMAGE_KEY], key)
