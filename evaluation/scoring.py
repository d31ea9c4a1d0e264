"""The Ray actor of an evaluation: restores one image by one method, scores it, and commits the record last; GANs."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.config import BicubicMethod, EvaluateConfig, GanMethod, Method, ModelMethod
from evaluation.inputs import EvaluationImage, OutputFiles
from evaluation.metrics.image import sharpness
from evaluation.metrics.perturbations import perturb, perturbation_border, undo
from evaluation.metrics.registry import Quality
from evaluation.results import image_row
from infra.errors import DataError, ModelError, line_of
from infra.files.publish import download_file, put_if_absent, shared_folder, write_bytes
from infra.files.storage import file_size, is_s3, join, modified_seconds, name_of
from infra.imaging.images import encode_png, read_image
from infra.imaging.pictures import resized
from infra.imaging.pixels import StabilityAccumulator, l_std, l_std_equal_sharpness, psnr_y
from training.models import fetch_model
from training.restore.seeded_runs import restore_runs, rows_at_once_on
from training.restore.trace import trace_runs

TRACED_RUNS = 4


def record_uri(output: str, method: str, key: str) -> str:
    return join(output, "records", method, f"{key}.json")


@dataclass(frozen=True)
class ScoreTask:
    """An image, a method to score on it, that method's output files where it is `outputs`; `trace`: timesteps too."""

    method: Method
    image: EvaluationImage
    outputs: OutputFiles | None
    trace: bool


class Scorer:
    """`available`: the metrics to compute; the config's others stay null. One model is kept loaded at a time."""

    def __init__(self, config: EvaluateConfig, available: Sequence[str]) -> None:
        self._config = config
        self._metrics = [name for name in config.metrics if name != "fid"]
        self._loaded: tuple[str, Any] = ("", None)
        self._device = config.runtime.device
        self._quality = Quality(available, crop_border=config.crop_border, device=self._device)

    def __call__(self, task: ScoreTask) -> str:
        """Score one image's outputs by one method and commit the record; returns which, for people."""
        config, method, image, files = self._config, task.method, task.image, task.outputs
        border = config.crop_border
        lr, hr, size = image.read()
        seeds_of = image.noise_key or image.key
        bicubic = resized(lr, size)
        self._write_inputs(image.key, lr, hr, seeds_of)
        runs: Iterable[np.ndarray]
        trace: list[dict[str, Any]] = []
        if task.trace and isinstance(method, ModelMethod):
            trace, runs = self._traced(method, lr, hr, bicubic, seeds_of)
        else:
            runs = map(read_image, files.runs) if files else self._restored(method, lr, size, seeds_of)
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
        numbers |= self._against_perturbations(method, files, lr, hr, kept[0], seeds_of)
        row = image_row(method.name, image.key, size, scores, **numbers)
        record = json.dumps({"scores": scores, "image": row, "trace": trace}, sort_keys=True).encode()
        put_if_absent(record_uri(config.output, method.name, image.key), record)
        return f"{method.name}: {image.key}"

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

    def _traced(
        self, method: ModelMethod, lr: np.ndarray, hr: np.ndarray | None, bicubic: np.ndarray, key: str
    ) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
        """Per visited timestep `t`: `psnr_y` (None without HR) and `sharpness`, means over the first runs, and their
        `l_std`; and all runs' images at the last one, which are the outputs."""
        found, border, outputs = [], self._config.crop_border, []
        reference = bicubic if hr is None else hr
        model = self._model(method.model)
        seeds = {**self._seeds(key), "num_traced": TRACED_RUNS}
        for t, outputs in trace_runs(model, lr, bicubic.shape[:2], method.sampling, **seeds):
            first = outputs[:TRACED_RUNS]
            psnr = None if hr is None else float(np.mean([psnr_y(o, hr, crop_border=border) for o in first]))
            sharp = float(np.mean([sharpness(o, reference, crop_border=border) for o in first]))
            found.append({"t": t, "psnr_y": psnr, "sharpness": sharp, "l_std": l_std(first, crop_border=border)})
        return found, outputs

    def _seeds(self, key: str, num_runs: int | None = None) -> dict[str, Any]:
        runs = range(num_runs or self._config.num_runs)
        at_once = self._config.runtime.rows_at_once or rows_at_once_on(self._device)
        return {"seed": self._config.seed, "key": key, "runs": runs, "rows_at_once": at_once}

    def _write_inputs(self, key: str, lr: np.ndarray, hr: np.ndarray | None, seeds_of: str) -> None:
        pictures: dict[tuple[str, ...], np.ndarray] = {("lr",): lr} | ({} if hr is None else {("hr",): hr})
        pictures |= {("lr_perturbed", name): perturb(lr, name, seeds_of) for name in self._config.perturbations}
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
            yield resized(lr, size)
        elif isinstance(method, ModelMethod):
            model = self._model(method.model)
            yield from restore_runs(model, lr, size, method.sampling, **self._seeds(key, num_runs))
        elif isinstance(method, GanMethod):
            yield run_gan(self._model(method.model, load_gan), lr, size, where=f"{method.model}, image {key}")

    def _model(self, uri: str, load: Callable[[str, str], Any] = fetch_model) -> Any:
        import torch

        if self._loaded[0] != uri:
            torch.set_num_threads(self._config.runtime.threads)
            self._loaded = (uri, load(uri, self._device))
        return self._loaded[1]


@contextmanager
def gan_file(uri: str) -> Iterator[Path]:
    """A network's file while the block runs; of one on S3 the copy that the processes of a node share meanwhile."""
    if not is_s3(uri):
        yield Path(uri)
        return
    version = hashlib.sha256(f"{uri} {file_size(uri)} {modified_seconds(uri)}".encode()).hexdigest()[:32]
    with shared_folder(version, lambda copy: download_file(uri, copy / name_of(uri))) as copy:
        yield copy / name_of(uri)


def load_gan(uri: str, device: str = "cpu") -> Any:
    """The network in a published file, float32, in eval mode. ModelError without spandrel, and for a file of no
    architecture that it knows."""
    try:
        from spandrel import ImageModelDescriptor, ModelLoader
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision that does not fit torch
        raise ModelError(
            f"kind: gan cannot be loaded here ({error})", where=uri, todo="pip install 'ccsr-cluster[gan]'"
        ) from error
    with gan_file(uri) as file:
        if not file.is_file():
            raise ModelError("there is no file here", where=uri, todo="check the path")
        try:
            found = ModelLoader(device).load_from_file(file)
        except Exception as error:  # unpickling raises whatever a file makes it raise
            raise ModelError(
                f"this file holds no network that spandrel knows ({type(error).__name__}: {line_of(error)})",
                where=uri,
                todo="give a published .pth or .safetensors file, or the method's outputs with kind: outputs",
            ) from error
    if not isinstance(found, ImageModelDescriptor) or found.input_channels != 3 or found.output_channels != 3:
        raise ModelError("this network does not enlarge RGB images", where=uri, todo="give one that does")
    return found.eval()


def check_gan(network: Any, lr: np.ndarray, size: tuple[int, int], *, where: str) -> None:
    """DataError where the network does not enlarge `lr`, uint8 RGB (h, w, 3), to `size` = (H, W)."""
    if (lr.shape[0] * network.scale, lr.shape[1] * network.scale) != tuple(size):
        raise DataError(
            f"this network enlarges {network.scale} times, to another size than {size[0]} x {size[1]} px",
            where=where,
            todo="use a network of the test set's scale",
        )


def run_gan(network: Any, lr: np.ndarray, size: tuple[int, int], *, where: str) -> np.ndarray:
    """uint8 RGB of `size` = (H, W) from `lr`, uint8 RGB (h, w, 3). Errors of `check_gan`."""
    import torch

    check_gan(network, lr, size, where=where)
    with torch.inference_mode():
        x = torch.from_numpy(lr.copy()).to(network.device).permute(2, 0, 1)[None] / 255
        return network(x)[0].clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
