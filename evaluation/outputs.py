"""Outputs that another method made: which file is run r of image KEY, checked before anything is scored."""

import re
from collections.abc import Sequence

from evaluation.sets import content_id, images_by_key
from infra.errors import DataError

_RUN_FOLDER = re.compile(r"(?:sample|runs-)(\d+)-(.+)")  # as `images_by_key` writes sampleNN/KEY and runs/NN/KEY


def find_outputs(folder: str, keys: Sequence[str], num_runs: int) -> dict[str, list[str]]:
    """Key -> one URI per run, of `sampleNN/KEY.png` or `runs/NN/KEY.png`; or a single one, of `KEY.png`.

    Of more runs the first `num_runs` in order of their numbers are taken. Raises DataError where a run or an image of
    a run is missing, and for a single run folder, which says nothing about stability.
    """
    runs: dict[int, dict[str, str]] = {}
    plain: dict[str, str] = {}
    for name, uri in images_by_key(folder).items():
        match = _RUN_FOLDER.fullmatch(name)
        if match:
            runs.setdefault(int(match[1]), {})[match[2]] = uri
        else:
            plain[name] = uri
    if set(keys) & plain.keys():  # a deterministic method; test images may themselves be called sample0-x
        plain |= {name: uri for name, uri in images_by_key(folder).items() if name in keys}
        _require_all(plain, keys, folder)
        return {key: [plain[key]] for key in keys}
    if len(runs) < num_runs:
        single = "; a deterministic method's outputs lie in the folder itself" if len(runs) == 1 else ""
        raise DataError(
            f"these outputs have {len(runs)} runs, {num_runs} are asked for",
            where=folder,
            todo=f"add the missing sampleNN/ or runs/NN/ folders, or lower num_runs (at least 2){single}",
        )
    chosen = sorted(runs)[:num_runs]
    for run in chosen:
        _require_all(runs[run], keys, f"{folder}, run {run}")
    return {key: [runs[run][key] for run in chosen] for key in keys}


def outputs_id(outputs: dict[str, list[str]]) -> str:
    """Names the content of outputs, wherever they lie."""
    return content_id((f"{key} {run}", uri) for key, uris in outputs.items() for run, uri in enumerate(uris))


def _require_all(found: dict[str, str], keys: Sequence[str], where: str) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(keys)} images have no output; the first is {missing[0]!r}",
            where=where,
            todo="name every output as its test image, with .png in place of the suffix",
        )
