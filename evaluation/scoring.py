"""The Ray actor of an evaluation: restores one image by one method, scores it, and commits the record last."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.config import BicubicMethod, EvaluateConfig, Method, ModelMethod
from evaluation.metrics.image import sharpness
from evaluation.metrics.registry import Quality
from evaluation.results import image_row
from evaluation.sets import EvaluationImage
from infra.images import encode_png, read_image, resize_bicubic
from infra.pixels import StabilityAccumulator
from infra.publish import put_if_absent, write_bytes
from infra.storage import join
from training.models import fetch_model
from training.restore.restore import restore_runs


def record_uri(output: str, method: str, key: str) -> str:
    return join(output, "records", method, f"{key}.json")


@dataclass(frozen=True)
class ScoreTask:
    """An image, the method to score on it, and that method's output files where it is `outputs`."""

    method: Method
    image: EvaluationImage
    outputs: list[str]


class Scorer:
    """`available`: the metrics to compute; the config's others stay null. One model is kept loaded at a time."""

    def __init__(self, config: EvaluateConfig, available: Sequence[str]) -> None:
        self._config = config
        self._loaded: tuple[str, Any] = ("", None)
        self._device = config.runtime.device
        self._quality = Quality(available, crop_border=config.crop_border, device=self._device)

    def __call__(self, task: ScoreTask) -> str:
        """Score one image's outputs by one method and commit the record; returns which, for people."""
        config, method, image = self._config, task.method, task.image
        lr, hr, size = image.read()
        reference = resize_bicubic(lr, size[1], size[0]) if hr is None else hr
        folder = join(config.output, "images")
        put_if_absent(join(folder, "lr", f"{image.key}.png"), encode_png(lr))
        if hr is not None:
            put_if_absent(join(folder, "hr", f"{image.key}.png"), encode_png(hr))
        stability = StabilityAccumulator(crop_border=config.crop_border)
        scores: dict[str, list[float | None]] = {name: [] for name in config.metrics if name != "fid"}
        sharp: list[float] = []
        outputs: Iterable[np.ndarray] = (
            map(read_image, task.outputs) if task.outputs else self._restored(method, lr, size, image.key)
        )
        for run, output in enumerate(outputs):
            write_bytes(join(folder, method.name, f"{run:02d}", f"{image.key}.png"), encode_png(output))
            stability.add(output)
            sharp.append(sharpness(output, reference, crop_border=config.crop_border))
            found = self._quality(output, hr)
            for name, values_so_far in scores.items():
                values_so_far.append(found.get(name))
        l_std = 0.0
        if len(sharp) > 1:
            l_std = stability.l_std()
            levels = np.rint(np.clip(stability.map(), 0, 1) * 65535).astype(np.uint16)
            write_bytes(join(folder, method.name, "l_std", f"{image.key}.png"), encode_png(levels))
        row = image_row(method.name, image.key, size, scores, l_std=l_std, sharpness=float(np.mean(sharp)))
        record = json.dumps({"scores": scores, "image": row}, sort_keys=True).encode()
        put_if_absent(record_uri(config.output, method.name, image.key), record)
        return f"{method.name}: {image.key}"

    def _restored(self, method: Method, lr: np.ndarray, size: tuple[int, int], key: str) -> Iterator[np.ndarray]:
        if isinstance(method, BicubicMethod):
            yield resize_bicubic(lr, size[1], size[0])
        elif isinstance(method, ModelMethod):
            yield from restore_runs(
                self._model(method.model),
                lr,
                size,
                method.sampling,
                seed=self._config.seed,
                key=key,
                runs=range(self._config.num_runs),
                rows_at_once=self._config.runtime.rows_at_once,
            )

    def _model(self, uri: str) -> Any:
        import torch

        if self._loaded[0] != uri:
            torch.set_num_threads(self._config.runtime.threads)
            self._loaded = (uri, fetch_model(uri, self._device))
        return self._loaded[1]
