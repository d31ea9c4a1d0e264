"""`ccsr restore`: enlarge photographs with a trained model, every output from a recorded seed."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from infra.config import Config, apply_overrides, parse_config
from infra.display.progress import progress
from infra.errors import CcsrError, ConfigError, DataError, PartialResultError
from infra.images import decode_image, encode_png, icc_profile, list_images
from infra.mlflow_server import TrackingConfig
from infra.process.numerics import NumericsConfig, set_numerics
from infra.publish import put_if_absent
from infra.ray_runtime import RayConfig, on_ray
from infra.run import claim_output
from infra.storage import absolute, exists, join, list_files, read_bytes
from infra.tracking import find_model
from training.config import SamplingConfig
from training.models import CcsrModel, fetch_model, model_id
from training.restore.restore import PreparedImage, check_sampling, prepare_image, restore_batch

MIN_SIDE = 16
IMAGES_PER_TASK = 8
BATCH_PIXELS = {"cpu": 8 * 512**2, "cuda": 16 * 512**2}


class RestoreRuntime(Config):
    """How the job runs; of the pictures it moves single levels by float rounding."""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    rows_at_once: int | None = Field(None, ge=1, description="(image, run) pairs in a batch; none: by their size")
    use_ray: bool = False
    num_actors: int = Field(1, ge=1, description="with use_ray")
    ray: RayConfig = RayConfig()


class RestoreConfig(Config):
    """What a restoration depends on, besides the images and the model."""

    num_runs: int = Field(1, ge=1)
    seed: int = 0
    scale: float = Field(4, ge=1, le=8)
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    sampling: SamplingConfig = SamplingConfig()
    numerics: NumericsConfig = NumericsConfig()
    runtime: RestoreRuntime = RestoreRuntime()


def restore_config(options: Mapping[str, Any]) -> RestoreConfig:
    """The config that the options of `ccsr restore` make. Raises ConfigError."""
    sampling = {name: options[name] for name in ("t_max", "t_min")}
    sampling |= {
        "num_steps": options["steps"],
        "tile": options["tile"] or None,
        "color_fix": options["color"],
    }
    values = {name: options[name] for name in ("seed", "scale", "dtype")} | {
        "num_runs": options["runs"],
        "sampling": sampling,
        "runtime": {"device": options["device"], "use_ray": options["ray"]},
    }
    return parse_config(apply_overrides(values, options["set_"] or []), RestoreConfig, where="command line")


def pick_device(runtime: RestoreRuntime) -> Literal["cpu", "cuda"]:
    """The device that `auto` chooses: a GPU where this machine has one.

    ConfigError for `auto` on Ray, whose actors run on other machines than this one, and for a GPU that is not here.
    """
    if runtime.use_ray and runtime.device == "auto":
        raise ConfigError(
            "device auto asks the machine that starts the job, not those that restore",
            where="device, with --ray",
            todo="add --device cuda for one GPU per actor, or --device cpu",
        )
    if runtime.device == "cuda" and not runtime.use_ray and not torch.cuda.is_available():
        raise ConfigError(
            "there is no GPU here", where="device", todo="use --device cpu, or --ray on a cluster with GPUs"
        )
    if runtime.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return runtime.device


def _resolved(config: RestoreConfig) -> RestoreConfig:
    """`config` without `auto`; a GPU's dtype is bfloat16, a CPU's float32."""
    device = pick_device(config.runtime)
    dtype = {"cpu": "float32", "cuda": "bfloat16"}[device] if config.dtype == "auto" else config.dtype
    runtime = config.runtime.model_copy(update={"device": device})
    return config.model_copy(update={"dtype": dtype, "runtime": runtime})


def restore(source: str, output: str, model_uri: str, config: RestoreConfig) -> int:
    """Restore one file, or all images below a folder or s3:// prefix; returns how many images there are.

    `model_uri`: a model directory, the folder of the run that trained one, or runs:/ID.
    Writes OUT/NAME.png, or OUT/runs/NN/NAME.png for several runs, and OUT/run.json. What is there is kept. A file that
    cannot be used is passed over; PartialResultError names them at the end.
    """
    config = _resolved(config)
    source, output, model_uri = map(absolute, (source, output, model_uri))
    model_uri = find_model(model_uri, TrackingConfig())
    inputs = {"model": model_id(model_uri)}
    check_sampling(model_uri, config.sampling)
    names = {source: Path(source).stem} if exists(source) else _names(source)
    claim_output(output, config, job="restore", inputs=inputs, libraries=("torch", "diffusers", "numpy", "pillow"))
    done = set(list_files(output))
    images = []
    for uri, name in names.items():
        runs = [run for run in range(config.num_runs) if _place(output, name, run, config.num_runs) not in done]
        if runs:
            images.append({"uri": uri, "name": name, "runs": runs})
    failures: dict[str, str] = {}
    with progress("restoring", len(names), done=len(names) - len(images)) as advance:
        for name, failure in _outcomes(images, output, model_uri, config):
            if failure:
                failures[name] = failure
            advance(1, name)
    if failures:
        raise PartialResultError(
            f"{len(failures)} of {len(names)} images could not be restored: {'; '.join(list(failures.values())[:5])}"
            + ("; ..." if len(failures) > 5 else ""),
            where=source,
            todo="repair or remove these files and run the same command again; the others are done",
        )
    return len(names)


def _outcomes(
    images: list[dict[str, Any]], output: str, model_uri: str, config: RestoreConfig
) -> Iterator[tuple[str, str]]:
    if not images:
        return
    runtime = config.runtime
    if not runtime.use_ray:
        set_numerics(config.numerics)
        yield from Restorer(config, model_uri, output).restore(images)
        return

    def make() -> Callable[[list[dict[str, Any]]], list[tuple[str, str]]]:
        restorer = Restorer(config, model_uri, output)
        return lambda group: list(restorer.restore(group))

    for outcomes in on_ray(
        make,
        [images[first : first + IMAGES_PER_TASK] for first in range(0, len(images), IMAGES_PER_TASK)],
        config=runtime.ray,
        num_actors=runtime.num_actors,
        device=runtime.device,
        numerics=config.numerics,
        output=output,
    ):
        yield from outcomes


class _Row(NamedTuple):
    image: PreparedImage
    run: int
    profile: bytes | None
    uri: str
    last: bool


class Restorer:
    """Keeps one model loaded and restores images with it; whoever writes an output first wins, nothing is replaced."""

    def __init__(self, config: RestoreConfig, model_uri: str, output: str) -> None:
        self._config, self._output = config, output
        self._model: CcsrModel = fetch_model(model_uri, config.runtime.device, getattr(torch, config.dtype))

    def restore(self, images: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """Per image {"uri", "name", "runs"} its (name, failure), "" where all its runs were written.

        Neighbouring images whose latents have one shape share batches.
        """
        rows: list[_Row] = []
        for task in images:
            try:
                image, profile = self._prepare(task)
            except (CcsrError, MemoryError, RuntimeError) as error:
                yield task["name"], f"{task['uri']}: {_reason(error)}"
                continue
            for run in task["runs"]:
                full = len(rows) >= self._rows_at_once(image)
                if rows and (full or rows[0].image.mean.shape != image.mean.shape):
                    yield from self._write(rows)
                    rows = []
                rows.append(_Row(image, run, profile, task["uri"], run == task["runs"][-1]))
        yield from self._write(rows)

    def _prepare(self, task: dict[str, Any]) -> tuple[PreparedImage, bytes | None]:
        data = read_bytes(task["uri"])
        lr = decode_image(data, where=task["uri"])
        if min(lr.shape[:2]) < MIN_SIDE:
            raise DataError(
                f"{lr.shape[1]}x{lr.shape[0]} px is too small, a side needs {MIN_SIDE}",
                where=task["uri"],
                todo="use a larger image",
            )
        height, width = (math.ceil(round(side * self._config.scale, 6)) for side in lr.shape[:2])
        image = prepare_image(self._model, lr, (height, width), self._config.sampling, key=task["name"])
        return image, icc_profile(data)

    def _rows_at_once(self, image: PreparedImage) -> int:
        runtime, tile = self._config.runtime, self._config.sampling.tile
        sides = image.enlarged.shape[-2:]
        in_networks = math.prod(side if tile is None else min(side, tile) for side in sides)
        pixels = BATCH_PIXELS[runtime.device]
        return runtime.rows_at_once or max(1, min(64, pixels // in_networks, 4 * pixels // math.prod(sides)))

    def _write(self, rows: list[_Row]) -> Iterator[tuple[str, str]]:
        config = self._config
        if not rows:
            return
        pairs = [(row.image, row.run) for row in rows]
        written = 0
        try:
            for row, picture in zip(
                rows, restore_batch(self._model, pairs, config.sampling, seed=config.seed), strict=True
            ):
                place = _place(self._output, row.image.key, row.run, config.num_runs)
                put_if_absent(place, encode_png(picture, row.profile))
                written += 1
                if row.last:
                    yield row.image.key, ""
        except (MemoryError, RuntimeError) as error:
            failed = {row.uri: row.image.key for row in rows[written:]}
            for uri, name in failed.items():
                yield name, f"{uri}: {_reason(error)}"


def _reason(error: Exception) -> str:
    """What to tell of an image that failed; an error that is neither the user's nor a lack of memory is raised."""
    if isinstance(error, CcsrError):
        return error.what
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "the memory was used up; use a smaller scale or tile, or fewer rows at once"
    raise error


def _names(source: str) -> dict[str, str]:
    """URI -> output name (without suffix): the path below `source`, told apart where only the suffix differs."""
    root = source.rstrip("/")
    below = {uri: uri.removeprefix(root).lstrip("/") for uri in list_images(source)}
    taken = Counter(path.rsplit(".", 1)[0] for path in below.values())
    names = {}
    for uri, path in below.items():
        name = path.rsplit(".", 1)[0]
        names[uri] = name if taken[name] == 1 else f"{name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    return names


def _place(output: str, name: str, run: int, num_runs: int) -> str:
    return join(output, f"{name}.png") if num_runs == 1 else join(output, "runs", f"{run:02d}", f"{name}.png")
