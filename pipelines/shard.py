"""`ccsr shard`: Ray Data tasks write the planned shards, each exactly once."""

import hashlib
import json
import logging
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from degradation import DegradationConfig, degrade, load_preset
from infra.errors import CcsrError, ConfigError, DataError, PartialResultError, error_from_json, error_to_json
from infra.images import UnusableImageError, decode_image, encode_png
from infra.manifest import Manifest, Quarantined, ShardRecord, commit_record, committed_records, write_manifest
from infra.progress import progress
from infra.ray_runtime import lost_worker, ray_cluster
from infra.run import claim_output
from infra.seeding import rng_for
from infra.shards import write_tar
from infra.storage import download, exists, join, publish_if_absent, read_bytes, sha256_file
from pipelines.config import CenterCrop, RandomCrop, ShardConfig
from pipelines.plan import PlannedSample, PlannedShard, plan_shards, source_id
from pipelines.sources import list_sources

LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "torch")


def run_shard(config: ShardConfig) -> Manifest:
    """Write the shard set and return its manifest; what an earlier run committed is kept.

    Raises PartialResultError (after everything else is done) if more than `runtime.max_failed_fraction` of the
    samples were quarantined.
    """
    recipe = resolve_degradation(config)
    files = list_sources(config.sources)
    shards = plan_shards(files, config)
    run = claim_output(config.output, config, job="shard", inputs={"source_id": source_id(files)}, libraries=LIBRARIES)
    if not exists(join(config.output, "manifest.json")):
        _write_shards(config, recipe, shards)
        write_manifest(
            config.output, len(shards), source_id=source_id(files), fingerprint=run["fingerprint"], **_facts(recipe)
        )
    manifest = Manifest.load(config.output)
    _report_quarantine(config, manifest)
    return manifest


def resolve_degradation(config: ShardConfig) -> DegradationConfig | None:
    """The recipe that `degradation` names or spells out. ConfigError for an unknown name, or a crop it cannot take."""
    recipe = load_preset(config.degradation) if isinstance(config.degradation, str) else config.degradation
    size = getattr(config.crop, "size_px", 0)
    if recipe and size % recipe.scale:
        raise ConfigError(
            f"a crop of {size} px is no multiple of the degradation's scale, {recipe.scale}",
            where="crop.size_px",
            todo=f"write {size - size % recipe.scale}, for one",
        )
    return recipe


def _facts(recipe: DegradationConfig | None) -> dict[str, Any]:
    return {"scale": recipe.scale if recipe else None, "has_lr": recipe is not None}


def _write_shards(config: ShardConfig, recipe: DegradationConfig | None, shards: list[PlannedShard]) -> None:
    done = committed_records(config.output)
    pending = [shard for shard in shards if shard.index not in done]
    num_samples = sum(len(shard.samples) for shard in shards)
    num_pending = sum(len(shard.samples) for shard in pending)
    with progress("sharding", num_samples, done=num_samples - num_pending) as advance:
        if not pending:
            return
        with ray_cluster(config.runtime.ray):
            import ray
            from ray.data import DataContext

            logging.getLogger("ray.data").setLevel(logging.ERROR)
            DataContext.get_current().enable_progress_bars = False

            def write(row: dict[str, Any]) -> dict[str, Any]:
                shard = pickle.loads(row["shard"])
                try:
                    write_shard(config, recipe, shard)
                except CcsrError as error:
                    return {"num_samples": 0, "error": error_to_json(error)}
                return {"num_samples": len(shard.samples), "error": ""}

            rows = [{"shard": pickle.dumps(shard)} for shard in pending]
            tasks = ray.data.from_items(rows, override_num_blocks=len(rows))
            try:
                for row in tasks.map(write, num_cpus=1, concurrency=config.runtime.num_workers).iter_rows():
                    if row["error"]:
                        raise error_from_json(row["error"])
                    advance(row["num_samples"])
            except ray.exceptions.RayError as error:
                raise lost_worker(error, config.output) from error


def write_shard(config: ShardConfig, recipe: DegradationConfig | None, shard: PlannedShard) -> ShardRecord:
    """Make one shard's tar locally, publish it unless it is there, then commit its record. Safe to repeat and to race.

    The tar's bytes depend on the plan, the config and the library versions. Samples that cannot be made are
    quarantined with their reason.
    """
    import cv2

    cv2.setNumThreads(1)
    quarantined: list[Quarantined] = []
    with tempfile.TemporaryDirectory(prefix="ccsr-shard-") as folder:
        tar = Path(folder) / "shard.tar"
        entries = write_tar(tar, shard.name, _samples(config, recipe, shard.samples, quarantined))
        record = ShardRecord(shard.index, shard.name, sha256_file(tar), tar.stat().st_size, entries, quarantined)
        place = join(config.output, shard.name)
        if not publish_if_absent(tar, place):
            present = sha256_file(download(place, Path(folder)))
            if present != record.sha256:
                raise DataError(
                    f"another shard is already there (sha256 {present[:12]}, this run makes {record.sha256[:12]})",
                    where=place,
                    todo="remove that file if no record names it, or use a new output",
                )
    commit_record(config.output, record)
    return record


def _samples(
    config: ShardConfig,
    recipe: DegradationConfig | None,
    planned: tuple[PlannedSample, ...],
    quarantined: list[Quarantined],
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for file, samples in groupby(planned, key=lambda sample: sample.file):  # a file is decoded once for all its crops
        data = read_bytes(file.uri)
        digest = hashlib.sha256(data).hexdigest()
        image: np.ndarray | UnusableImageError
        try:
            image = decode_image(data, where=file.uri)
        except UnusableImageError as error:
            image = error
        for sample in samples:
            try:
                if isinstance(image, UnusableImageError):
                    raise image
                yield sample.key, make_sample(image, digest, sample, config, recipe)
            except UnusableImageError as error:
                quarantined.append(Quarantined(sample.key, file.name, error.reason, error.what, digest))


def make_sample(
    image: np.ndarray, digest: str, sample: PlannedSample, config: ShardConfig, recipe: DegradationConfig | None
) -> dict[str, bytes]:
    """The members of one sample: hr.png, lr.png where there is a degradation, and json with how they were made."""
    hr, crop = crop_image(image, sample, config, scale=recipe.scale if recipe else 1)
    facts: dict[str, Any] = {
        "key": sample.key,
        "source": f"{sample.file.source}/{sample.file.name}",
        "source_sha256": digest,
        "crop": crop,
        "seed": config.seed,
    }
    members: dict[str, bytes] = {}
    if recipe is None:
        members["hr.png"] = encode_png(hr)
    else:
        pair = degrade(hr, recipe, rng_for(config.seed, sample.key, "degradation"))
        members["hr.png"] = encode_png(pair.hr)
        members["lr.png"] = encode_png(pair.lr)
        facts["degradation"] = pair.trace
    members["json"] = json.dumps(facts, sort_keys=True).encode()
    return members


def crop_image(
    image: np.ndarray, sample: PlannedSample, config: ShardConfig, *, scale: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The sample's window of an image, and where it lay. UnusableImageError (`too_small`) if it does not fit."""
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
    window = np.ascontiguousarray(image[y : y + size_h, x : x + size_w])
    return window, {"kind": crop.kind, "x": x, "y": y, "width": size_w, "height": size_h}


def _shrink_short_side(image: np.ndarray, size: int) -> np.ndarray:
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    ratio = size / min(picture.size)
    size_wh = (round(picture.width * ratio), round(picture.height * ratio))
    return np.asarray(picture.resize(size_wh, Image.Resampling.BICUBIC))


def _report_quarantine(config: ShardConfig, manifest: Manifest) -> None:
    failed = manifest.facts["quarantined"]
    total = manifest.num_samples + len(failed)
    if len(failed) > config.runtime.max_failed_fraction * total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(i["reason"] for i in failed).most_common())
        first = failed[0]
        raise PartialResultError(
            f"{len(failed)} of {total} samples were quarantined ({reasons}); the first: {first['source']}: "
            f"{first['message']}. The other {manifest.num_samples} are complete",
            where=join(config.output, "manifest.json"),
            todo="repair these files and shard into a new output, or allow them with runtime.max_failed_fraction",
        )
