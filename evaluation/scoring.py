"""The Ray actor of an evaluation: restores one image by one method, scores it, and commits the record last."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evaluation.config import BicubicMethod, EvaluateConfig, Method, ModelMethod
from evaluation.inputs import EvaluationImage, OutputFiles
from evaluation.metrics.image import sharpness
from evaluation.metrics.perturbations import perturb, perturbation_border, undo
from evaluation.metrics.registry import Quality
from evaluation.metrics.stability import l_std_equal_sharpness
from evaluation.results import image_row
from infra.images import encode_png, read_image, resize_bicubic
from infra.pixels import StabilityAccumulator, l_std
from infra.storage import join, put_if_absent, write_bytes
from training.restore.restore import fetch_model, restore_runs


def record_uri(output: str, method: str, key: str) -> str:
    return join(output, "records", method, f"{key}.json")


class Scorer:
    """`available`: the metrics to compute; the config's others stay null. One model is kept loaded at a time."""

    def __init__(self, config: EvaluateConfig, available: Sequence[str]) -> None:
        self._config = config
        self._metrics = [name for name in config.metrics if name != "fid"]
        self._loaded: tuple[str, Any] = ("", None)
        self._device = "cuda" if config.runtime.use_gpu else "cpu"
        self._quality = Quality(available, crop_border=config.crop_border, device=self._device)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """`task`: `method` (its index in the config) and `image`, JSON of the image and of a method's output files."""
        config, method, border = self._config, self._config.methods[task["method"]], self._config.crop_border
        values = json.loads(task["image"])
        image = EvaluationImage.from_dict(values["image"])
        files = OutputFiles(**values["outputs"]) if values["outputs"] else None
        lr, hr, size = image.read()
        bicubic = resize_bicubic(lr, size[1], size[0])
        self._write_inputs(image.key, lr, hr)
        runs = map(read_image, files.runs) if files else self._restored(method, lr, size, image.key)
        kept: list[np.ndarray] = []
        scores: dict[str, list[float | None]] = {name: [] for name in self._metrics}
        for run, output in enumerate(runs):
            write_bytes(self._place(method.name, f"{run:02d}", image.key), encode_png(output))
            kept.append(output)
            self._score(scores, output, hr, border)
        numbers: dict[str, Any] = {
            "sharpness": np.mean([sharpness(o, bicubic if hr is None else hr, crop_border=border) for o in kept]),
            "l_std": 0.0,
        }
        if len(kept) > 1:
            stability = StabilityAccumulator(crop_border=border)
            for output in kept:
                stability.add(output)
            levels = np.rint(np.clip(stability.map(), 0, 1) * 65535).astype(np.uint16)
            write_bytes(self._place(method.name, "l_std", image.key), encode_png(levels))
            numbers["l_std"] = stability.l_std()
            numbers["l_std_equal_sharpness"] = l_std_equal_sharpness(kept, bicubic, crop_border=border)
        numbers |= self._against_perturbations(method, files, lr, hr, kept[0], image.key)
        row = image_row(method.name, image.key, size, scores, **numbers)
        record = json.dumps({"scores": scores, "image": row}, sort_keys=True).encode()
        put_if_absent(record_uri(config.output, method.name, image.key), record)
        return {"method": method.name, "key": image.key}

    def _against_perturbations(
        self,
        method: Method,
        files: OutputFiles | None,
        lr: np.ndarray,
        hr: np.ndarray | None,
        first: np.ndarray,
        key: str,
    ) -> dict[str, Any]:
        """`p_std` and `perturbed`, the scores of `first` (run 0) and of the undone outputs for perturbed LR images.

        Empty without perturbations, for outputs that have none, and for an image that is too small.
        """
        height, width = first.shape[:2]
        scale = height // lr.shape[0]
        border = perturbation_border(self._config.crop_border, scale)
        names = self._config.perturbations
        if not names or (files and not files.perturbed) or min(height, width) <= 2 * border:
            return {}
        outputs = [first]
        for name in names:
            if files:
                output = read_image(files.perturbed[name])
            else:
                (output,) = self._restored(method, perturb(lr, name, key), (height, width), key, num_runs=1)
            outputs.append(undo(output, name, scale))
        scores: dict[str, list[float | None]] = {name: [] for name in self._metrics}
        for output in outputs:
            self._score(scores, output, hr, border)
        return {"p_std": l_std(outputs, crop_border=border), "perturbed": scores}

    def _write_inputs(self, key: str, lr: np.ndarray, hr: np.ndarray | None) -> None:
        pictures: dict[tuple[str, ...], np.ndarray] = {("lr",): lr} | ({} if hr is None else {("hr",): hr})
        pictures |= {("lr_perturbed", name): perturb(lr, name, key) for name in self._config.perturbations}
        for parts, picture in pictures.items():
            put_if_absent(self._place(*parts, key), encode_png(picture))

    def _score(
        self, scores: dict[str, list[float | None]], output: np.ndarray, hr: np.ndarray | None, border: int
    ) -> None:
        found = self._quality(output, hr, crop_border=border)
        for name, values in scores.items():
            values.append(found.get(name))

    def _place(self, *parts: str) -> str:
        return join(self._config.output, "images", *parts) + ".png"

    def _restored(
        self, method: Method, lr: np.ndarray, size: tuple[int, int], key: str, num_runs: int | None = None
    ) -> Iterator[np.ndarray]:
        """The first `num_runs` runs, all by default; a deterministic method has one."""
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
                runs=range(num_runs or self._config.num_runs),
                runs_at_once=self._config.runtime.runs_at_once,
            )

    def _model(self, uri: str) -> Any:
        import torch

        if self._loaded[0] != uri:
            torch.set_num_threads(self._config.runtime.threads_per_actor)
            self._loaded = (uri, fetch_model(uri, self._device))
        return self._loaded[1]
