"""Test sets as lists of images with key, LR and maybe HR; other methods' outputs for them; all read and checked."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from evaluation.config import FolderSet, NamedSet, OutputsMethod
from infra.display.progress import progress
from infra.errors import DataError
from infra.files.storage import join, read_bytes
from infra.imaging.images import below, decode_image, list_images, read_image
from infra.imaging.pairing import by_pair_name
from infra.shards.keys import key_of, keys_of
from infra.shards.manifest import Manifest
from infra.shards.shard import Entry, image_of, read_sample

_OF_A_RUN = re.compile(r"(?:sample|runs/)(\d+)/(.+)")


@dataclass(frozen=True)
class EvaluationImage:
    """One image of a test set. `lr` and `hr` are files, or both the shard set that holds `entry`; hr None: none.

    `scale`: HR side over LR side; 0: as the HR image has it.
    """

    key: str
    lr: str
    hr: str | None
    scale: int = 0
    entry: Entry | None = None
    noise_key: str = ""  # where it is not the key: an image's noise depends on its own path alone

    def read(self) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int]]:
        """uint8 RGB LR, HR or None, and the HR's (height, width) in px. DataError where the sizes do not fit."""
        if self.entry is not None:
            members = read_sample(self.lr, self.entry)
            lr, hr = (decode_image(image_of(members, m), where=f"{self.lr}: {self.key}.{m}") for m in ("lr", "hr"))
            return lr, hr, hr.shape[:2]
        lr = decode_image(read_bytes(self.lr), where=self.lr)
        if self.hr is None:
            return lr, None, (lr.shape[0] * self.scale, lr.shape[1] * self.scale)
        hr = decode_image(read_bytes(self.hr), where=self.hr)
        factors = {big / small for big, small in zip(hr.shape[:2], lr.shape[:2], strict=True)}
        factor = factors.pop()
        if factors or not factor.is_integer() or (self.scale and factor != self.scale):
            multiple = f"is not {self.scale} times" if self.scale else "is no whole multiple of"
            raise DataError(
                f"the HR image ({hr.shape[0]} x {hr.shape[1]} px) {multiple} its LR image "
                f"({lr.shape[0]} x {lr.shape[1]} px, height x width)",
                where=f"{self.hr} and {self.lr}",
                todo="pair each HR image with its own LR image, cropped to a multiple of the scale",
            )
        return lr, hr, hr.shape[:2]


@dataclass(frozen=True)
class EvaluationSet:
    """`dataset_id` identifies the content, not its place: images, their keys and, without HR, the scale."""

    dataset_id: str
    images: list[EvaluationImage]


def load_sets(data: Sequence[str | FolderSet | NamedSet]) -> EvaluationSet:
    """All images of `data`, in order. Raises DataError where a set is incomplete or two images share a key."""
    parts = [_from_shards(part) if isinstance(part, str) else _from_folders(part) for part in data]
    images = [image for part in parts for image in part.images]
    key, count = Counter(image.key for image in images).most_common(1)[0]
    if count > 1:
        places = [image.lr for image in images if image.key == key]
        todo = "rename one of the two files, or write one evaluation for each set in `data`"
        raise DataError(f"two images have the key {key}", where=", ".join(places[:2]), todo=todo)
    return EvaluationSet("+".join(part.dataset_id for part in parts), images)


def folders_of(part: str | FolderSet | NamedSet) -> list[str]:
    """What a test set is read from."""
    if isinstance(part, str):
        return [part]
    return [part.path] if isinstance(part, NamedSet) else [part.lr, *([part.hr] if part.hr else [])]


def _from_shards(uri: str) -> EvaluationSet:
    manifest = Manifest.load(uri)
    if not manifest.has_lr:
        raise DataError("these shards hold no LR images", where=uri, todo="shard with a degradation")
    return EvaluationSet(manifest.dataset_id, [EvaluationImage(e.key, uri, uri, entry=e) for e in manifest.entries])


def _from_folders(folders: FolderSet | NamedSet) -> EvaluationSet:
    expected, name, scale = None, "", 0
    if isinstance(folders, NamedSet):
        layout, name = folders.layout, folders.set
        expected, scale, hr = layout["num_images"], layout["scale"], layout.get("hr")
        folders = FolderSet(lr=join(folders.path, layout["lr"]), hr=hr and join(folders.path, hr))
    lr_files = _by_key(_below(folders.lr))
    if folders.hr is None:
        images = [EvaluationImage(key, uri, None, scale or folders.scale) for key, uri in lr_files.items()]
    else:
        lr_files, hr_files = by_pair_name(lr_files, _by_key(_below(folders.hr)))
        alone = sorted(lr_files.keys() ^ hr_files.keys())
        if alone:
            raise DataError(
                f"{len(alone)} images have no partner; the first is {alone[0]!r}",
                where=folders.hr if alone[0] in lr_files else folders.lr,
                todo="give folders in which an HR image and its LR image have the same name, or one with _HR, _LR4, x4",
            )
        images = [EvaluationImage(key, uri, hr_files[key], scale) for key, uri in lr_files.items()]
    images = [replace(one, noise_key=key_of(below(one.lr, folders.lr))) for one in images]
    if expected is not None and len(images) != expected:
        raise DataError(
            f"{name} has {len(images)} images here, {expected} as published",
            where=folders.lr,
            todo=f"complete it; for another selection give its folders as {{lr: ..., hr: ...}} instead of set: {name}",
        )
    return EvaluationSet(content_id(images), images)


def _below(folder: str) -> dict[str, str]:
    """Path below the folder -> URI, of its images."""
    return {below(uri, folder): uri for uri in list_images(folder)}


def _by_key(paths: Mapping[str, str]) -> dict[str, str]:
    return dict(zip(keys_of(list(paths)), paths.values(), strict=True))


def content_id(images: Sequence[EvaluationImage]) -> str:
    """16 hex digits that name the pixels, keys and sizes of images in any order. Each is read and checked once."""

    def line(image: EvaluationImage) -> str:
        lr, hr, size = image.read()
        digest = hashlib.sha256(lr.tobytes() + (b"" if hr is None else hr.tobytes())).hexdigest()
        return f"{image.key} {lr.shape} {size} {digest}"

    with ThreadPoolExecutor(8) as pool:
        lines = sorted(pool.map(line, images))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class OutputFiles:
    """Another method's outputs for one image: a file per run, and one per perturbation of the LR image."""

    runs: list[str]
    perturbed: dict[str, str]


Outputs = dict[str, OutputFiles]  # by key


def find_outputs(
    method: OutputsMethod, keys: Sequence[str], num_runs: int, perturbations: Sequence[str] = ()
) -> Outputs:
    """Key -> the files of `sampleNN/KEY.png` or `runs/NN/KEY.png`, a run each; or of `KEY.png`, the only run.

    Of more runs the first `num_runs` in order of their numbers are taken. Outputs for perturbed LR images are
    `perturbed/NAME/KEY.png`; a method has those of all `perturbations` or none. Raises DataError where a run or an
    image of a run is missing, and for a single run folder, which says nothing about stability.
    """
    folder = method.outputs
    runs: dict[int, dict[str, str]] = {}
    only: dict[str, str] = {}
    perturbed: dict[str, dict[str, str]] = {}
    for path, uri in _below(folder).items():
        first, _, rest = path.partition("/")
        if match := _OF_A_RUN.fullmatch(path):
            runs.setdefault(int(match[1]), {})[match[2]] = uri
        elif first == "perturbed":
            perturbed.setdefault(rest.partition("/")[0], {})[rest.partition("/")[2]] = uri
        else:
            only[path] = uri
    if runs and len(runs) < num_runs:
        single = "; a deterministic method's outputs are in the folder itself" if len(runs) == 1 else ""
        raise DataError(
            f"these outputs have {len(runs)} runs, {num_runs} are asked for",
            where=folder,
            todo=f"add the missing sampleNN/ or runs/NN/ folders, or lower num_runs (at least 2){single}",
        )
    chosen = {f"run {run}": runs[run] for run in sorted(runs)[:num_runs]} if runs else {"": only}
    of_runs = [_of_keys(files, keys, method.pattern, folder, run) for run, files in chosen.items()]
    names = perturbations if perturbed else ()
    of_perturbations = {
        name: _of_keys(perturbed.get(name, {}), keys, method.pattern, folder, f"perturbed/{name}") for name in names
    }
    return {
        key: OutputFiles([files[key] for files in of_runs], {name: of_perturbations[name][key] for name in names})
        for key in keys
    }


def _of_keys(paths: Mapping[str, str], keys: Sequence[str], pattern: str, folder: str, part: str) -> dict[str, str]:
    """Key -> its file, of files by their paths below the folder of a run. Names may have the marks of pairs, or the
    other case where that leaves one file."""
    files = _by_key(paths)
    paired, images = by_pair_name(files, {key: key for key in keys})
    files = {images[name]: uri for name, uri in paired.items() if name in images} | files
    folded = {} if len({name.lower() for name in files}) < len(files) else {name.lower(): files[name] for name in files}
    found = {}
    for key in keys:
        name = pattern.replace("{key}", key)
        uri = files.get(name) or folded.get(name.lower())
        if uri is not None:
            found[key] = uri
    missing = [key for key in keys if key not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(keys)} images have no output; the first is {missing[0]!r}",
            where=f"{folder}, {part}" if part else folder,
            todo=_suggestion(files, keys) or "name every output as its test image, with .png in place of the suffix",
        )
    return found


def _suggestion(files: Mapping[str, str], keys: Sequence[str]) -> str:
    """The pattern that would find a file for every key, if there is one."""
    names = {name.lower() for name in files}
    first = keys[0].lower()
    for name in sorted(files):
        at = name.lower().find(first)
        before, after = name[: max(at, 0)], name[at + len(first) :]
        if at >= 0 and all(f"{before}{key}{after}".lower() in names for key in keys):
            return f'set pattern: "{before}{{key}}{after}" for this method'
    return ""


def outputs_id(outputs: Outputs, images: Sequence[EvaluationImage]) -> str:
    """16 hex digits that name the pixels of outputs, wherever they are stored; every file is read.

    Raises DataError for one that is unreadable or of another size than its test image, so before anything is scored.
    """
    total = sum(len(files.runs) + len(files.perturbed) for files in outputs.values())
    with progress("checking outputs", total) as advance, ThreadPoolExecutor(8) as pool:

        def lines(image: EvaluationImage) -> list[str]:
            size = image.read()[2]
            digests = []
            files = outputs[image.key]
            for run, uri in [*enumerate(files.runs), *files.perturbed.items()]:
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
