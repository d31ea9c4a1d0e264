"""Held-out pairs restored while training runs: PSNR-Y, L-STD and pictures, the same numbers at every world size."""

from dataclasses import dataclass

import numpy as np

from infra.errors import DataError
from infra.images import decode_image, encode_png, resize_bicubic
from infra.manifest import Manifest
from infra.pixels import l_std, psnr_y
from infra.shards import Entry, image_of, read_sample
from training.config import SamplingConfig, TrainConfig, ValidationConfig
from training.models import CcsrModel
from training.restore.restore import restore_runs
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

        DataError for a set without LR images.
        """
        settings = config.validation
        if settings is None:
            return None
        manifests = [Manifest.load(uri) for uri in settings.data]
        for manifest in manifests:
            if not manifest.facts["has_lr"]:
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
        """{"psnr_y" (dB), "l_std"}: means over images; collective. Numbers and pictures (LR, every run, HR) are logged.

        Run r of an image draws from (seed, key, r), and the means are taken in the images' order: nothing depends on
        the world size. No training state is touched.
        """
        places = range(context.rank, len(self.images), context.world_size)
        mine, error = attempt(lambda: [self._score(model, place) for place in places])
        agree(context, error)
        scored = sorted((image for part in all_objects(context, mine) for image in part), key=lambda image: image[0])
        if context.tracker is not None:  # rank 0
            for place, _, _, picture in scored:
                key = self.images[place][1].key
                context.tracker.file(f"validation/{position:012d}/{key}.png", picture)
        psnrs, stds = ([image[column] for image in scored] for column in (1, 2))
        scores = {"psnr_y": float(np.mean(psnrs)), "l_std": float(np.mean(stds))}
        if context.tracker is not None:
            context.tracker.metrics({f"validation/{name}": score for name, score in scores.items()}, step=position)
        return scores

    def _score(self, model: CcsrModel, place: int) -> tuple[int, float, float, bytes]:
        uri, entry = self.images[place]
        members = read_sample(uri, entry)
        lr, hr = (decode_image(image_of(members, m), where=f"{uri}: {entry.key}.{m}") for m in ("lr", "hr"))
        height, width = hr.shape[:2]
        runs = range(self.settings.num_runs)
        images = list(
            restore_runs(model, lr, (height, width), self.sampling, seed=self.config.seed, key=entry.key, runs=runs)
        )
        picture = np.hstack([resize_bicubic(lr, width, height), *images, hr])
        return place, float(np.mean([psnr_y(image, hr) for image in images])), l_std(images), encode_png(picture)
