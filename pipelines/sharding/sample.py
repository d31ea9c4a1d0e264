"""One sample's making: the source file opened, cropped, degraded and encoded."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from degradation.config import DegradationConfig
from degradation.pipeline import degrade
from infra.imaging.images import UnusableImageError, decode_image, encode_png, is_plain_jpeg, refusing
from infra.imaging.png import is_plain_png
from infra.seeding import rng_for
from infra.shards.shard import CAPTION, image_of, read_sample
from pipelines.sharding.config import CenterCrop, GridCrop, RandomCrop, ShardConfig
from pipelines.sharding.files import SourceFile
from pipelines.sharding.inputs.containers import read_source_bytes
from pipelines.sharding.inputs.pairs import check_pair
from pipelines.sharding.plan import PlannedSample
from pipelines.sharding.screening.phash import perceptual_hash


@dataclass(frozen=True)
class Sample:
    """A finished sample: its members, what the index holds of it, and its HR and condition (LR; of a clean pair HR)."""

    key: str
    members: dict[str, bytes]
    phash: int
    digest: str
    scores: tuple[float, ...]
    hr: np.ndarray
    condition: np.ndarray | None


class SourceBytes(NamedTuple):
    data: bytes
    sha256: str
    caption: bytes = b""


@dataclass(frozen=True)
class Opened:
    """A decoded source and its image(s)."""

    source: SourceBytes
    image: np.ndarray
    lr_data: bytes = b""
    lr: np.ndarray | None = None


def read_source(file: SourceFile, *, with_caption: bool = True) -> SourceBytes:
    """A file's bytes, the SHA-256 of its photograph (a shard set remembers it), and its caption."""
    if file.entry is not None:
        members = read_sample(file.uri, file.entry)
        return SourceBytes(image_of(members), json.loads(members["json"])["source_sha256"], members.get(CAPTION, b""))
    data = read_source_bytes(file.uri)
    caption = read_source_bytes(file.caption_uri) if file.caption_uri and with_caption else b""
    return SourceBytes(data, hashlib.sha256(data).hexdigest(), caption if caption.strip() else b"")


def open_source(file: SourceFile, source: SourceBytes, *, convert: Collection[str] = ()) -> Opened:
    """Decode a file, of a pair both. UnusableImageError with its reason where that cannot be done, also (`caption`)
    where the caption is not UTF-8."""
    image = decode_image(source.data, where=file.uri, convert=convert)
    with refusing("caption", "the caption is not UTF-8", file.caption_uri or file.uri):
        source.caption.decode()
    if not file.lr_uri:
        return Opened(source, image)
    lr_data = read_source_bytes(file.lr_uri)
    lr = decode_image(lr_data, where=file.lr_uri, convert=convert)
    check_pair(image, lr, file.scale, where=f"{file.uri} and {file.lr_uri}")
    return Opened(source, image, lr_data, lr)


def variant_size(image: np.ndarray, variant: int, config: ShardConfig) -> tuple[int, int]:
    """(height, width) of an image at one of the config's sizes, rounded down as Real-ESRGAN's script does."""
    height, width = image.shape[:2]
    if variant < len(config.scales):
        ratio = config.scales[variant]
        return int(height * ratio), int(width * ratio)
    ratio = (config.short_side_px or 0) / min(height, width)
    return (height, width) if ratio >= 1 else (max(int(height * ratio), 1), max(int(width * ratio), 1))


def at_variant(image: np.ndarray, variant: int, config: ShardConfig) -> np.ndarray:
    """The image at one of the config's sizes, by Lanczos."""
    height, width = variant_size(image, variant, config)
    if image.shape[:2] == (height, width) or not height or not width:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def crop_image(
    image: np.ndarray, sample: PlannedSample, config: ShardConfig, *, scale: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The sample's window of an image (already at its variant's size), and its place. The window of a pair is on
    the LR's grid. UnusableImageError (`too_small`) if it does not fit."""
    crop = config.crop
    height, width = image.shape[:2]
    size = getattr(crop, "size_px", None)
    if size is None:
        size_h, size_w = height - height % scale, width - width % scale
        y, x = 0, 0
    else:
        size_h = size_w = size
    if isinstance(crop, CenterCrop):
        image = _shrink_short_side(image, crop.size_px)
        height, width = image.shape[:2]
        y, x = (height - size_h) // 2, (width - size_w) // 2
    if min(height, width, size_h, size_w) < 32 or height < size_h or width < size_w:
        raise UnusableImageError(
            f"{width}x{height} px is too small for a crop of {size_w}x{size_h} (at least 32x32)",
            where=sample.file.uri,
            todo="leave it out or ask for a smaller crop",
            reason="too_small",
        )
    if isinstance(crop, RandomCrop):
        rng = rng_for(config.seed, sample.crop_key, "crop")
        y, x = int(rng.integers(height - size_h + 1)), int(rng.integers(width - size_w + 1))
        y, x = y - y % sample.file.scale, x - x % sample.file.scale
    elif isinstance(crop, GridCrop) and sample.at is not None:
        y, x = sample.at
    window = np.ascontiguousarray(image[y : y + size_h, x : x + size_w])
    return window, {"kind": crop.kind, "x": x, "y": y, "width": size_w, "height": size_h}


def _shrink_short_side(image: np.ndarray, size: int) -> np.ndarray:
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    ratio = size / min(picture.size)
    size_wh = (round(picture.width * ratio), round(picture.height * ratio))
    return np.asarray(picture.resize(size_wh, Image.Resampling.BICUBIC))


def make_sample(
    opened: Opened,
    window: np.ndarray,
    crop: dict[str, Any],
    planned: PlannedSample,
    config: ShardConfig,
    recipe: DegradationConfig | None,
    scores: tuple[float, ...],
) -> Sample:
    """Degrade and encode a window: hr.png, lr.png where there is a degradation or a pair, txt where there is a caption,
    json with how they were made.

    An image that is taken whole keeps its file's bytes where that is a plain PNG or JPEG (then hr.jpg, lr.jpg); of a
    JPEG, whose decoders differ in rounding, the json has the SHA-256 of the pixels.
    """
    facts: dict[str, Any] = {
        "key": planned.key,
        "source": f"{planned.file.source}/{planned.file.name}",
        "source_sha256": opened.source.sha256,
        "crop": crop,
        "seed": config.seed,
    }
    hr, lr = window, None
    clean = False
    if opened.lr is not None:
        scale = planned.file.scale
        y, x, height, width = (crop[name] // scale for name in ("y", "x", "height", "width"))
        lr = np.ascontiguousarray(opened.lr[y : y + height, x : x + width])
        facts["degradation"] = {"clean": False}
    elif recipe is not None:
        pair = degrade(window, recipe, rng_for(config.seed, planned.key, "degradation"))
        hr, lr, clean = pair.hr, pair.lr, bool(pair.trace["clean"])
        facts["degradation"] = pair.trace
    members: dict[str, bytes] = {}
    for side, image, whole, data in (
        ("hr", hr, opened.image, opened.source.data),
        ("lr", lr, opened.lr, opened.lr_data),
    ):
        if image is None:
            continue
        untouched = whole is not None and image.shape == whole.shape and np.array_equal(image, whole)
        if untouched and is_plain_jpeg(data):
            members[f"{side}.jpg"] = data
            facts[f"{side}_pixels_sha256"] = hashlib.sha256(image.tobytes()).hexdigest()
        else:
            members[f"{side}.png"] = data if untouched and is_plain_png(data) else encode_png(image)
    if opened.source.caption:
        members[CAPTION] = opened.source.caption
    members["json"] = json.dumps(facts, sort_keys=True).encode()
    digest = opened.source.sha256
    return Sample(planned.key, members, perceptual_hash(window), digest, scores, hr, hr if clean else lr)
