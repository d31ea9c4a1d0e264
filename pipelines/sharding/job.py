"""`ccsr shard`: Ray Data tasks write the planned shards, each exactly once."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from degradation.config import DegradationConfig
from infra.config import result_part
from infra.display.progress import progress
from infra.errors import DataError, PartialResultError
from infra.files.publish import download, publish_if_absent, staging, temporary_folder
from infra.files.storage import exists, join, sha256_file
from infra.imaging.images import UnusableImageError
from infra.mlflow.models import find_model
from infra.mlflow.server import TrackingConfig, check_tracking
from infra.process.memory import give_back_memory
from infra.process.ray_runtime import on_ray
from infra.run import Progress, check_config, claim_output
from infra.shards.manifest import Manifest, Quarantined, ShardRecord, commit_record, committed, write_manifest
from infra.shards.shard import CAPTION, IndexedEntry, write_tar
from pipelines.sharding.config import GridCrop, ShardConfig, brings_lr
from pipelines.sharding.files import FileList, Made
from pipelines.sharding.inputs.pages import remove_listings
from pipelines.sharding.plan import PlannedSample, PlannedShard, grid_samples, num_variants, plan_shards, source_id
from pipelines.sharding.recipe import resolve_degradation
from pipelines.sharding.reports.card import write_card
from pipelines.sharding.reports.mlflow_shard_set import log_shard_set
from pipelines.sharding.sample import (
    Sample,
    at_variant,
    crop_image,
    make_sample,
    open_source,
    read_source,
    variant_size,
)
from pipelines.sharding.screening.dedupe import count_near_duplicates, without_near_duplicates
from pipelines.sharding.screening.filters import scores_of, unwanted, unwanted_file
from pipelines.sharding.sources import check_apart, list_sources, source_facts

if TYPE_CHECKING:
    from pipelines.sharding.latents import LatentEncoder

LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "torch")


def run_shard(config: ShardConfig) -> Manifest:
    """Write the shard set and return its manifest; what an earlier run committed is kept.

    Raises PartialResultError (after everything else is done) if more than `runtime.max_failed_fraction` of the
    samples were quarantined.
    """
    config = with_model_found(config)
    recipe, files, shards, run = _claimed(config)
    rate = None
    if not exists(join(config.output, "manifest.json")):
        if config.tracking:
            check_tracking(config.tracking)
        began = time.monotonic()
        rate = _write_shards(config, recipe, shards) / max(time.monotonic() - began, 1e-9)
        facts = {**set_facts(config, recipe, files), "fingerprint": run["fingerprint"]}
        write_manifest(config.output, len(shards), **facts)
    manifest = Manifest.load(config.output)
    if not exists(join(config.output, "DATA_CARD.md")):
        write_card(manifest)
    log_shard_set(config, manifest, run, rate)
    remove_listings(config.output)  # where MLflow was away, the next run lists the same files
    report_quarantine(config, manifest)
    return manifest


def preview_shard(config: ShardConfig) -> Progress:
    """What `run_shard` would do; raises what it would before it starts. Nothing is written."""
    _, files, shards, _ = _claimed(with_model_found(config), write=False)
    done = len(shards) if exists(join(config.output, "manifest.json")) else len(committed(config.output))
    what = f"shards, degraded by {config.degradation}" if isinstance(config.degradation, str) else "shards"
    return Progress(done, len(shards), "shards", f"{len(files):,} files", what)


def with_model_found(config: ShardConfig) -> ShardConfig:
    """The config with the directory of the model that `latents` names. Errors as of `find_model`."""
    if config.latents is None:
        return config
    model = find_model(config.latents.model, config.tracking or TrackingConfig())
    return config.model_copy(update={"latents": config.latents.model_copy(update={"model": model})})


def _claimed(
    config: ShardConfig, *, write: bool = True
) -> tuple[DegradationConfig | None, FileList, Made[int, PlannedShard], dict[str, Any]]:
    """The recipe, the source files, the plan of those that are no near-duplicates, and run.json."""
    recipe = resolve_degradation(config)
    check_apart(config.output, config.sources)
    check_config(config.output, result_part(config), job="shard")
    begun = write and not exists(join(config.output, "manifest.json"))
    files = list_sources(config.sources, config.output, keep=begun)
    inputs = {"source_id": source_id(files), **_latents_inputs(config)}
    run = claim_output(config.output, config, job="shard", inputs=inputs, libraries=LIBRARIES, write=write)
    kept = without_near_duplicates(files, config, write=write)
    return recipe, files, plan_shards(kept, config), run


def _latents_inputs(config: ShardConfig) -> dict[str, Any]:
    if config.latents is None:
        return {}
    from training.models import model_id  # the networks, whose import takes seconds

    # The device is named because the last bits differ between CPU and GPU.
    return {"latents": {"model": model_id(config.latents.model), "device": _device(config)}}


def set_facts(config: ShardConfig, recipe: DegradationConfig | None, files: FileList) -> dict[str, Any]:
    pairs = (getattr(source, "scale", None) for source in config.sources if brings_lr(source))
    scale = recipe.scale if recipe else next(pairs, None)
    facts = {
        "source_id": source_id(files),
        **({} if config.dedupe is None else {"near_duplicates": count_near_duplicates(config.output)}),
        "sources": source_facts(config.sources, files),
        "scale": scale,
        "has_lr": scale is not None,
    }
    encoder = latent_encoder(config, "cpu")  # where the driver is, there need not be a GPU
    if config.latents is None or encoder is None:
        return facts
    return facts | {"latents_model": encoder.encoder_id, "sampled_steps": config.latents.sampled_steps}


def _write_shards(config: ShardConfig, recipe: DegradationConfig | None, shards: Made[int, PlannedShard]) -> int:
    """Write what is missing; the number of its samples."""
    done = set(committed(config.output))
    pending = Made([index for index in shards.keys if index not in done], shards.make)
    full, last = config.samples_per_shard, shards[-1].count
    num_samples = full * (len(shards) - 1) + last
    num_pending = full * len(pending) - (0 if len(shards) - 1 in done else full - last)
    with progress("sharding", num_samples, done=num_samples - num_pending) as advance:
        runtime = config.runtime
        written = on_ray(
            lambda: shard_writer(config, recipe),
            pending,
            config=runtime.ray,
            num_actors=(runtime.num_actors or 1) if config.latents else None,  # which keep the model
            num_tasks=runtime.num_actors,
            device=runtime.device if config.latents else "cpu",
            numerics=config.latents.numerics if config.latents else None,
            output=config.output,
        )
        for count in written:
            advance(count)
    return num_pending


def shard_writer(config: ShardConfig, recipe: DegradationConfig | None) -> Callable[[PlannedShard], int]:
    """A worker's function: write a shard, return its number of samples."""
    encoder = latent_encoder(config)

    def write(shard: PlannedShard) -> int:
        write_shard(config, recipe, shard, encoder)
        return len(shard.samples)

    return write


def latent_encoder(config: ShardConfig, device: str | None = None) -> "LatentEncoder | None":
    """Adds the latents, if the config asks for them."""
    if config.latents is None:
        return None
    from pipelines.sharding.latents import LatentEncoder  # the networks, whose import takes seconds

    return LatentEncoder(config.latents, device or _device(config), config.seed)


def _device(config: ShardConfig) -> str:
    return config.runtime.device


def write_shard(
    config: ShardConfig,
    recipe: DegradationConfig | None,
    shard: PlannedShard,
    encoder: "LatentEncoder | None" = None,
) -> ShardRecord:
    """Make one shard's tar locally, publish it unless it is there, then commit its record. Safe to repeat and to race.

    The tar's bytes depend on the plan, the config and the library versions (latents: on the device too). Samples that
    cannot be made are quarantined with their reason; those that a filter leaves out, and those of a smaller size
    without room for a window, are counted as dropped. `encoder` adds the latents.
    """
    import cv2

    cv2.setNumThreads(1)
    quarantined: list[Quarantined] = []
    dropped: Counter[str] = Counter()
    place = join(config.output, shard.name)
    with staging(place) as tar:
        indexed: list[tuple[int, str, tuple[float, ...]]] = []
        sides: list[int] = []
        captions: list[bool] = []

        def members(samples: Iterable[Sample]) -> Iterator[tuple[str, dict[str, bytes]]]:
            for sample in samples:
                indexed.append((sample.phash, sample.digest, sample.scores))
                captions.append(CAPTION in sample.members)
                sides.append(min(sample.hr.shape[:2]))
                yield sample.key, sample.members
                give_back_memory()

        samples = _samples(config, recipe, shard.samples, quarantined, dropped)
        written = write_tar(tar, shard.name, members(encoder(samples) if encoder else samples))
        entries = [IndexedEntry.of(entry, *more) for entry, more in zip(written, indexed, strict=True)]
        record = ShardRecord(
            shard.index,
            shard.name,
            sha256_file(tar),
            tar.stat().st_size,
            entries,
            quarantined,
            dict(sorted(dropped.items())),
            min(sides, default=None),
            sum(captions),
        )
        if not publish_if_absent(tar, place):
            with temporary_folder("shard") as folder:
                present = sha256_file(download(place, folder))
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
    dropped: Counter[str],
) -> Iterator[Sample]:
    for file, group in groupby(planned, key=lambda sample: sample.file):  # a file is decoded once for all its crops
        samples, digest = list(group), ""
        try:
            source = read_source(file)
            digest = source.sha256
            opened = open_source(file, source, convert=config.converted)
        except UnusableImageError as error:
            quarantined += [Quarantined(one.key, file.name, error.reason, error.what, digest) for one in samples]
            continue
        if reason := unwanted_file(opened.image, config):
            dropped[reason] += len(samples)
            continue
        if isinstance(config.crop, GridCrop):
            sizes = [variant_size(opened.image, variant, config) for variant in range(num_variants(config))]
            samples = grid_samples(samples[0], config.crop, sizes, config.draws)
        for variant, crops in groupby(samples, key=lambda sample: sample.variant):
            image = at_variant(opened.image, variant, config)
            for one in crops:
                try:
                    window, crop = crop_image(image, one, config, scale=recipe.scale if recipe else file.scale)
                except UnusableImageError as error:
                    if variant:  # the photograph itself is used
                        dropped[error.reason] += 1
                    else:
                        quarantined.append(Quarantined(one.key, file.name, error.reason, error.what, digest))
                    continue
                if image.shape != opened.image.shape:
                    crop["resized"] = [image.shape[1], image.shape[0]]
                scores = scores_of(window)
                if reason := unwanted(scores, config):
                    dropped[reason] += 1
                    continue
                yield make_sample(opened, window, crop, one, config, recipe, scores)


def report_quarantine(config: ShardConfig, manifest: Manifest) -> None:
    failed = manifest.quarantined
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
