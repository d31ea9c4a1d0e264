"""The Ray actor of an evaluation: restores one image by one method, scores it, and commits the record last."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from evaluation.config import BicubicMethod, EvaluateConfig, ModelMethod
from evaluation.metrics.image import sharpness
from evaluation.metrics.registry import Quality
from evaluation.results import image_row
from evaluation.sets import EvaluationImage
from infra.images import encode_png, read_image, resize_bicubic
from infra.pixels import StabilityAccumulator
from infra.storage import join, put_if_absent, write_bytes
from training.restore.restore import fetch_model, restore_runs


def record_uri(output: str, method: str, key: str) -> str:
    return join(output, "records", method, f"{key}.json")


class Scorer:
    """`available`: the metrics to compute; the config's others stay null. One model is kept loaded at a time."""

    def __init__(self, config: EvaluateConfig, available: Sequence[str]) -> None:
        self._config = config
        self._loaded: tuple[str, Any] = ("", None)
        self._device = "cuda" if config.runtime.use_gpu else "cpu"
        self._quality = Quality(available, crop_border=config.crop_border, device=self._device)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """`task`: `method` (its place in the config) and `image`, JSON of the image and of a method's output files."""
        config, method = self._config, self._config.methods[task["method"]]
        values = json.loads(task["image"])
        image, files = EvaluationImage.from_dict(values["image"]), values["outputs"]
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
            map(read_image, files) if files else self._restored(task["method"], lr, size, image.noise_key or image.key)
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
        return {"method": method.name, "key": image.key}

    def _restored(self, number: int, lr: np.ndarray, size: tuple[int, int], key: str) -> Iterator[np.ndarray]:
        method = self._config.methods[number]
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
                runs_at_once=self._config.runtime.runs_at_once or (8 if self._config.runtime.use_gpu else 1),
            )

    def _model(self, uri: str) -> Any:
        import torch

        if self._loaded[0] != uri:
            torch.set_num_threads(self._config.runtime.threads_per_actor)
            self._loaded = (uri, fetch_model(uri, self._device))
        return self._loaded[1]
