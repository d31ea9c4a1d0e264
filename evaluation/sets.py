"""Test sets: shard sets, pair folders and LR-only folders, all a list of images with key, LR and maybe HR."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from evaluation.config import FolderSet
from infra.errors import DataError
from infra.images import below, decode_image, list_images
from infra.keys import key_of, keys_of
from infra.manifest import Manifest
from infra.pairing import by_pair_name
from infra.shards import Entry, read_sample
from infra.storage import read_bytes


@dataclass(frozen=True)
class EvaluationImage:
    """One image of a test set. `lr` and `hr` are files, or both the shard set in which `entry` lies; hr None: none.

    `scale`: HR side over LR side; 0 where the HR tells.
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
            lr, hr = (decode_image(members[f"{m}.png"], where=f"{self.lr}: {self.key}.{m}") for m in ("lr", "hr"))
            return lr, hr, hr.shape[:2]
        lr = decode_image(read_bytes(self.lr), where=self.lr)
        if self.hr is None:
            return lr, None, (lr.shape[0] * self.scale, lr.shape[1] * self.scale)
        hr = decode_image(read_bytes(self.hr), where=self.hr)
        factors = {big / small for big, small in zip(hr.shape[:2], lr.shape[:2], strict=True)}
        if len(factors) > 1 or not factors.pop().is_integer():
            raise DataError(
                f"the HR image ({hr.shape[0]} x {hr.shape[1]} px) is no whole multiple of its LR image "
                f"({lr.shape[0]} x {lr.shape[1]} px, height x width)",
                where=f"{self.hr} and {self.lr}",
                todo="pair each HR image with its own LR image, cropped to a multiple of the scale",
            )
        return lr, hr, hr.shape[:2]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "EvaluationImage":
        entry = values["entry"]
        return cls(**{**values, "entry": entry and Entry(**entry)})


@dataclass(frozen=True)
class EvaluationSet:
    """`dataset_id` names the content, wherever it lies: images, their keys and, without HR, the scale."""

    dataset_id: str
    images: list[EvaluationImage]


def load_sets(data: Sequence[str | FolderSet]) -> EvaluationSet:
    """All images of `data`, in order. Raises DataError where a set is incomplete or two images share a key."""
    parts = [_from_folders(part) if isinstance(part, FolderSet) else _from_shards(part) for part in data]
    images = [image for part in parts for image in part.images]
    key, count = Counter(image.key for image in images).most_common(1)[0]
    if count > 1:
        places = [image.lr for image in images if image.key == key]
        raise DataError(f"two images have the key {key}", where=", ".join(places[:2]), todo="rename or evaluate apart")
    return EvaluationSet("+".join(part.dataset_id for part in parts), images)


def _from_shards(uri: str) -> EvaluationSet:
    manifest = Manifest.load(uri)
    if not manifest.facts["has_lr"]:
        raise DataError("these shards hold no LR images", where=uri, todo="shard with a degradation")
    return EvaluationSet(manifest.dataset_id, [EvaluationImage(e.key, uri, uri, entry=e) for e in manifest.entries])


def _from_folders(folders: FolderSet) -> EvaluationSet:
    lr = images_by_key(folders.lr)
    if folders.hr is None:
        images = [EvaluationImage(key, uri, None, folders.scale) for key, uri in lr.items()]
    else:
        lr, hr = by_pair_name(lr, images_by_key(folders.hr))
        if lr.keys() != hr.keys():
            key = min(lr.keys() ^ hr.keys())
            raise DataError(
                f"{len(lr.keys() ^ hr.keys())} images have no partner; the first is {key!r}",
                where=folders.hr if key in lr else folders.lr,
                todo="give folders in which an HR image and its LR image have the same name, or one with _HR, _LR4, x4",
            )
        images = [EvaluationImage(key, lr[key], hr[key]) for key in lr]
    images = [dataclasses.replace(one, noise_key=key_of(below(one.lr, folders.lr))) for one in images]
    return EvaluationSet(content_id(images), images)


def images_by_key(folder: str) -> dict[str, str]:
    """Key -> URI of the images below a folder; see `infra.keys`."""
    uris = list(list_images(folder))
    return dict(zip(keys_of([below(uri, folder) for uri in uris]), uris, strict=True))


def content_id(images: Sequence[EvaluationImage]) -> str:
    """16 hex digits that name the pixels, keys and sizes of images in any order. Each is read and checked once."""

    def line(image: EvaluationImage) -> str:
        lr, hr, size = image.read()
        digest = hashlib.sha256(lr.tobytes() + (b"" if hr is None else hr.tobytes())).hexdigest()
        return f"{image.key} {lr.shape} {size} {digest}"

    with ThreadPoolExecutor(8) as pool:
        lines = sorted(pool.map(line, images))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
