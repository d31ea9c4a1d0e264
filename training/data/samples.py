"""One training sample: which it is, fetched by byte range, decoded, cropped, flipped and degraded; or its latents."""

import io
import json
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from PIL import Image

from degradation.config import DegradationConfig
from degradation.pipeline import degrade
from degradation.presets import load_preset
from infra.errors import ConfigError, DataError, line_of
from infra.imaging.images import decode_image
from infra.seeding import rng_for
from infra.shards.manifest import Manifest
from infra.shards.shard import CAPTION, Entry, image_of, read_sample
from training.config import TrainConfig
from training.data.order import FEISTEL, Order

LATENT_MOMENTS = ("hr.mean", "hr.std", "lr.mean", "lr.std")
SAMPLED = "sampled"  # the latent that a stage-1 model computed from the LR: what StableSR's stage 2 starts from


class Place(NamedTuple):
    """Where the sample of a position is stored: its shard set, its entry there, and the set's number in the config."""

    position: int
    uri: str
    entry: Entry
    number: int = 0


@dataclass(frozen=True)
class TrainingSample:
    """`hr` uint8 (S, S, 3) and `lr` uint8 (S / scale, S / scale, 3), RGB; the LR of a clean pair is the HR.

    `moments`: stored latents by name, float16 (4, S/8, S/8); stages 0 and 1 then have images of 0 x 0 px. `prompt`: the
    caption, or the empty one; None where all prompts are empty.
    """

    key: str
    position: int
    hr: np.ndarray
    lr: np.ndarray
    moments: dict[str, np.ndarray] = field(default_factory=dict)
    prompt: str | None = None


class SampleReader:
    """Samples by position from one or several shard sets, in the seeded order over all of them; `form` as of Order."""

    def __init__(self, manifests: Sequence[Manifest], config: TrainConfig, form: str = FEISTEL) -> None:
        self._sets = [(manifest.uri, manifest.entries) for manifest in manifests]
        sizes = tuple(manifest.num_samples for manifest in manifests)
        self._order = Order(config.seed, sizes, tuple(part.weight for part in config.data), form)
        self._firsts = list(accumulate(sizes, initial=0))
        latents = config.inputs == "latents"
        recipes = tuple(_recipe(config, number, manifest) for number, manifest in enumerate(manifests))
        self.maker = SampleMaker(
            config.seed,
            config.crop_px,
            recipes,
            latents,
            with_images=config.learns_images,
            with_sampled=config.starts_from_stored_samples,
            prompt_drop_rate=config.prompt_drop_rate if config.prompt == "caption" else None,
        )

    def place(self, position: int) -> Place:
        """Where the sample of a position is stored."""
        _, sample = self._order.sample_at(position)
        number = bisect(self._firsts, sample) - 1
        uri, entries = self._sets[number]
        return Place(position, uri, entries[sample - self._firsts[number]], number)

    def __call__(self, position: int) -> TrainingSample:
        """The sample at a position."""
        return self.maker(self.place(position))


@dataclass(frozen=True)
class SampleMaker:
    """Reads one sample. It knows neither index nor model, so it travels with a task and loads quickly anywhere.

    `recipes`: of each set; None for the stored LR. `latents`: the stored ones, together with the images only where
    `with_images`, with the sampled latent where `with_sampled`. `prompt_drop_rate`: of captions; None for no prompts.
    """

    seed: int
    crop_px: int
    recipes: tuple[DegradationConfig | None, ...]
    latents: bool = False
    with_images: bool = True
    with_sampled: bool = False
    prompt_drop_rate: float | None = None

    def __call__(self, place: Place) -> TrainingSample:
        """Its crop, flip, degradation and whether its caption is dropped depend on (seed, position) alone; stored
        latents are taken as they are."""
        entry = place.entry
        members = read_sample(place.uri, entry)
        where = f"{place.uri}/{entry.shard}: {entry.key}"
        sample = self._stored_latents(members, place, where) if self.latents else self._degraded(members, place, where)
        return sample if self.prompt_drop_rate is None else replace(sample, prompt=self._prompt(members, place, where))

    def _prompt(self, members: dict[str, bytes], place: Place, where: str) -> str:
        if rng_for(self.seed, "prompt", place.position).random() < (self.prompt_drop_rate or 0):
            return ""
        try:
            return members.get(CAPTION, b"").decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            what = f"the caption is not UTF-8 ({line_of(error)})"
            raise DataError(what, where=where, todo="shard these tars: `ccsr shard` sets such samples aside") from error

    def _degraded(self, members: dict[str, bytes], place: Place, where: str) -> TrainingSample:
        hr = decode_image(image_of(members), where=where)
        rng, recipe = rng_for(self.seed, "sample", place.position), self.recipes[place.number]
        lr = decode_image(image_of(members, "lr"), where=where) if recipe is None else hr
        hr, lr = _crop_pair(hr, lr, self.crop_px, rng, where)
        if rng.random() < 0.5:  # before the degradation, whose drift and block grid have a direction
            hr, lr = hr[:, ::-1], lr[:, ::-1]
        hr, lr = np.ascontiguousarray(hr), np.ascontiguousarray(lr)
        if recipe is None:
            clean = json.loads(members["json"])["degradation"]["clean"]
        else:
            pair = degrade(hr, recipe, rng)
            hr, lr, clean = pair.hr, pair.lr, pair.trace["clean"]
        return TrainingSample(place.entry.key, place.position, hr, hr if clean else lr)

    def _stored_latents(self, members: dict[str, bytes], place: Place, where: str) -> TrainingSample:
        """No window and no flip: another window is not stored encoded."""
        from safetensors.numpy import load

        if "latent.safetensors" not in members:
            raise DataError("this sample holds no latents", where=where, todo="train with `inputs: pixels`")
        width, height = Image.open(io.BytesIO(image_of(members))).size  # of the header: no pixel is decoded
        if width != self.crop_px or height != self.crop_px:
            raise DataError(
                f"the stored latents are of {width}x{height} px, not of crop_px = {self.crop_px}",
                where=where,
                todo="set crop_px to the size that the shards were cropped to",
            )
        moments = load(members["latent.safetensors"])
        hr = lr = np.zeros((0, 0, 3), np.uint8)
        if self.with_images:
            hr = decode_image(image_of(members), where=where)
            clean = json.loads(members["json"])["degradation"]["clean"]
            lr = hr if clean else decode_image(image_of(members, "lr"), where=where)
        names = (*LATENT_MOMENTS, SAMPLED) if self.with_sampled else LATENT_MOMENTS
        return TrainingSample(place.entry.key, place.position, hr, lr, {name: moments[name] for name in names})


def _recipe(config: TrainConfig, number: int, manifest: Manifest) -> DegradationConfig | None:
    chosen = config.data[number].degradation or config.degradation
    if chosen is None and not manifest.has_lr:
        raise DataError("these shards hold no LR images", where=manifest.uri, todo="name a `degradation` to train with")
    return load_preset(chosen) if isinstance(chosen, str) else chosen


def check_crop(config: TrainConfig, manifests: Sequence[Manifest]) -> None:
    """ConfigError where the crop does not fit the shards' scale or smallest image."""
    for manifest in manifests:
        if config.crop_px % (manifest.scale or 1):
            raise ConfigError(
                f"crop_px = {config.crop_px} is no multiple of these shards' scale, {manifest.scale}",
                where=manifest.uri,
                todo="choose a multiple of it",
            )
        side = manifest.facts.get("min_side_px") or config.crop_px  # not known of sets of an earlier version
        if side < config.crop_px or (config.inputs == "latents" and side != config.crop_px):
            raise ConfigError(
                f"crop_px = {config.crop_px} does not fit these shards, whose smallest image has a side of {side} px",
                where=manifest.uri,
                todo=f"write crop_px: {side - side % (manifest.scale or 1)}, or shard with larger crops",
            )


def check_stored(config: TrainConfig, manifests: Sequence[Manifest], encoder_id: str) -> None:
    """Refuse sets of which none has the captions that are to be prompts, and stored latents that another encoder made
    than the model's: `CcsrModel.encoder_id`."""
    if config.prompt == "caption" and not any(manifest.num_captions for manifest in manifests):
        raise ConfigError(
            "these shards hold no captions",
            where=", ".join(manifest.uri for manifest in manifests),
            todo="shard with `caption` in the sources, or leave `prompt: caption` out",
        )
    for manifest in manifests if config.inputs == "latents" else ():
        stored = manifest.facts.get("latents_model")
        if stored != encoder_id:
            raise ConfigError(
                f"the latents stored here are of encoder {stored}, the model's encoder is {encoder_id}"
                if stored
                else "these shards hold no latents",
                where=manifest.uri,
                todo="train with `inputs: pixels`, or shard with `latents` of this model",
            )
        if config.starts_from_stored_samples and not manifest.facts.get("sampled_steps"):
            raise ConfigError(
                "these shards hold no sampled latents, which stage 2 starts from",
                where=manifest.uri,
                todo="shard with `latents.sampled_steps`, or train with `inputs: pixels`, which samples at each update",
            )


def _crop_pair(
    hr: np.ndarray, lr: np.ndarray, size: int, rng: np.random.Generator, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """A random window of `size` HR px on the LR grid, and its LR window."""
    scale = hr.shape[0] // lr.shape[0]
    height, width = lr.shape[:2]
    if (height * scale, width * scale) != hr.shape[:2] or size % scale or min(hr.shape[:2]) < size:
        raise DataError(
            f"HR {hr.shape[1]}x{hr.shape[0]} and LR {width}x{height} do not allow a window of {size} px",
            where=where,
            todo="lower crop_px (a multiple of the scale), or shard with larger crops",
        )
    small = size // scale
    y, x = int(rng.integers(height - small + 1)), int(rng.integers(width - small + 1))
    return hr[y * scale :, x * scale :][:size, :size], lr[y:, x:][:small, :small]
