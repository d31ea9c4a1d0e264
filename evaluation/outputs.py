"""Outputs that another method made: which file is run r of image KEY, checked before anything is scored."""

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from evaluation.sets import EvaluationImage
from infra.display.progress import progress
from infra.errors import DataError
from infra.images import below, list_images, read_image
from infra.keys import keys_of
from infra.pairing import by_pair_name

_OF_A_RUN = re.compile(r"(?:sample|runs/)(\d+)/(.+)")


def find_outputs(folder: str, keys: Sequence[str], num_runs: int) -> dict[str, list[str]]:
    """Key -> one URI per run, of `sampleNN/KEY.png` or `runs/NN/KEY.png`; or a single one, of `KEY.png`.

    Of more runs the first `num_runs` in order of their numbers are taken. Raises DataError where a run or an image of
    a run is missing, and for a single run folder, which says nothing about stability.
    """
    files: dict[int, dict[str, str]] = {}
    plain: dict[str, str] = {}
    for uri in list_images(folder):
        match = _OF_A_RUN.fullmatch(below(uri, folder))
        if match:
            files.setdefault(int(match[1]), {})[match[2]] = uri
        else:
            plain[below(uri, folder)] = uri
    only, runs = _by_key(plain, keys), {run: _by_key(found, keys) for run, found in files.items()}
    if not runs:
        _require_all(only, keys, folder)
        return {key: [only[key]] for key in keys}
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


def outputs_id(outputs: dict[str, list[str]], images: Sequence[EvaluationImage]) -> str:
    """16 hex digits that name the pixels of outputs, wherever they lie; every file is read.

    Raises DataError for one that is unreadable or of another size than its test image, so before anything is scored.
    """
    total = sum(len(files) for files in outputs.values())
    with progress("checking outputs", total) as advance, ThreadPoolExecutor(8) as pool:

        def lines(image: EvaluationImage) -> list[str]:
            size = image.read()[2]
            digests = []
            for run, uri in enumerate(outputs[image.key]):
                output = read_image(uri)
                if output.shape[:2] != size:
                    raise DataError(
                        f"this output is {output.shape[0]} x {output.shape[1]} px, its test image {size[0]} x "
                        f"{size[1]} (height x width)",
                        where=uri,
                        todo="make all outputs at the test set's scale, without resizing or cropping",
                    )
                digests.append(f"{image.key} {run} {hashlib.sha256(output.tobytes()).hexdigest()}")
                advance(1)
            return digests

        found = sorted(line for lines_of_image in pool.map(lines, images) for line in lines_of_image)
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def _by_key(files: dict[str, str], keys: Sequence[str]) -> dict[str, str]:
    """The files by the image keys that their names stand for; others are left out."""
    found, images = by_pair_name(
        dict(zip(keys_of(list(files)), files.values(), strict=True)), dict(zip(keys, keys, strict=True))
    )
    return {images[name]: uri for name, uri in found.items() if name in images}


def _require_all(found: dict[str, str], keys: Sequence[str], where: str) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(keys)} images have no output; the first is {missing[0]!r}",
            where=where,
            todo="name every output as its test image, with .png in place of the suffix",
        )
