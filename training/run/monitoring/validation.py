"""Held-out pairs restored while training runs: numbers and pictures, the same at every world size."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch

from infra.errors import DataError
from infra.files.weights import list_weights
from infra.imaging.images import decode_image, encode_png
from infra.imaging.pictures import resized
from infra.imaging.pixels import CROP_BORDER, StabilityAccumulator, coloured, l_std_equal_sharpness, psnr_y
from infra.shards.manifest import Manifest
from infra.shards.shard import Entry, image_of, read_sample
from training.config import SamplingConfig, TrainConfig, ValidationConfig
from training.models import CcsrModel, load_dists, load_lpips
from training.restore.seeded_runs import restore_runs
from training.run.agreement import WorkerContext, agree, all_objects, attempt


@dataclass(frozen=True)
class Validation:
    """The held-out images of a run. Build it before training starts: it checks the shard sets."""

    config: TrainConfig
    settings: ValidationConfig
    images: list[tuple[str, Entry]]
    datasets: dict[str, str]
    sampling: SamplingConfig

    @classmethod
    def load(cls, config: TrainConfig) -> "Validation | None":
        """Choose `num_images` pairs, spread evenly over the sets; None where no validation is configured.

        DataError for a set without LR images, ModelError where `best_by` needs weights that are not here.
        """
        settings = config.validation
        if settings is None:
            return None
        if settings.best_by in PERCEPTUAL:
            PERCEPTUAL[settings.best_by].load()
        manifests = [Manifest.load(uri) for uri in settings.data]
        for manifest in manifests:
            if not manifest.has_lr:
                raise DataError(
                    "these shards hold no LR images", where=manifest.uri, todo="shard with a degradation to validate"
                )
        entries = [(manifest.uri, entry) for manifest in manifests for entry in manifest.entries]
        count = min(settings.num_images, len(entries))
        chosen = [entries[number * len(entries) // count] for number in range(count)]
        datasets = {manifest.uri: manifest.dataset_id for manifest in manifests}
        return cls(config, settings, chosen, datasets, settings.sampling or config.trained_sampling)

    def due(self, num_updates: int) -> bool:
        return num_updates % self.settings.every == 0 or num_updates == self.config.num_updates

    def __call__(self, model: CcsrModel, context: WorkerContext, position: int) -> dict[str, float]:
        """{"psnr_y" (dB), "l_std", "l_std_equal_sharpness", "lpips", "dists"}: means over images; collective. Logged
        too, with pictures: LR, runs, HR, map. Left out: those of missing weights, and what an image does not have.

        Run r of an image draws from (seed, key, r), and the means are taken in the images' order: nothing depends on
        the world size. No training state is touched.
        """
        places = range(context.rank, len(self.images), context.world_size)
        mine, error = attempt(lambda: [self._score(model, place) for place in places])
        agree(context, error)
        scored = sorted((image for part in all_objects(context, mine) for image in part), key=lambda image: image[0])
        if context.tracker is not None:  # rank 0
            for place, _, pictures in scored:
                for name, png in pictures.items():
                    context.tracker.image(f"validation/{self.images[place][1].key}/{name}", png, position)
        by_all = [
            name for name in scored[0][1] if all(name in scores for _, scores, _ in scored)
        ]  # nodes may differ in weights
        means = {name: float(np.mean([scores[name] for _, scores, _ in scored])) for name in by_all}
        scores = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        if context.tracker is not None:
            context.tracker.metrics({f"validation/{name}": score for name, score in scores.items()}, step=position)
        return scores

    def _score(self, model: CcsrModel, place: int) -> tuple[int, dict[str, float], dict[str, bytes]]:
        uri, entry = self.images[place]
        members = read_sample(uri, entry)
        lr, hr = (decode_image(image_of(members, m), where=f"{uri}: {entry.key}.{m}") for m in ("lr", "hr"))
        height, width = hr.shape[:2]
        runs = range(self.settings.num_runs)
        images = list(
            restore_runs(model, lr, (height, width), self.sampling, seed=self.config.seed, key=entry.key, runs=runs)
        )
        stability = StabilityAccumulator()
        for image in images:
            stability.add(image)
        enlarged = resized(lr, (height, width))
        pictures = {"lr": enlarged, "hr": hr, "l_std": coloured(stability.map())}
        pictures |= {f"run_{run}": image for run, image in zip(runs, images, strict=True)}
        scores = {"psnr_y": float(np.mean([psnr_y(image, hr) for image in images])), "l_std": stability.l_std()}
        scores["l_std_equal_sharpness"] = l_std_equal_sharpness(images, enlarged)
        for name, network in perceptual_metrics().items():
            scores[name] = float(np.mean([network(image, hr) for image in images]))
        return place, scores, {name: encode_png(picture) for name, picture in pictures.items()}


class Perceptual(NamedTuple):
    """A metric's network, the weight files that it needs, and the lowest value of its inputs; the highest is 1."""

    load: Callable[[], torch.nn.Module]
    weights: frozenset[str]
    low: float


PERCEPTUAL = {
    "lpips": Perceptual(lambda: load_lpips(trunk="alexnet"), frozenset({"alexnet", "lpips-alex"}), -1.0),
    "dists": Perceptual(load_dists, frozenset({"vgg16", "dists"}), 0.0),
}


@cache
def perceptual_metrics() -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    """The metrics whose weights are here, of two uint8 RGB images (H, W, 3), without their border, on a CPU."""
    present = {row["name"] for row in list_weights() if row["state"] == "present"}
    usable = {name: metric for name, metric in PERCEPTUAL.items() if metric.weights <= present}
    return {name: partial(_distance, metric.load().eval(), metric.low) for name, metric in usable.items()}


@torch.inference_mode()
def _distance(network: torch.nn.Module, low: float, *images: np.ndarray) -> float:
    inside = np.s_[CROP_BORDER:-CROP_BORDER, CROP_BORDER:-CROP_BORDER]
    tensors = [torch.from_numpy(image[inside].copy()).permute(2, 0, 1)[None] / 255 for image in images]
    return float(network(*(tensor * (1 - low) + low for tensor in tensors)))
