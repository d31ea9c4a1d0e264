"""`ccsr restore`: enlarge photographs with a trained model, every output from a recorded seed."""

import hashlib
import tempfile
from collections import Counter
from pathlib import Path

from pydantic import Field

from infra.config import Config
from infra.errors import CcsrError, PartialResultError
from infra.images import encode_png, list_images, read_image
from infra.progress import progress
from infra.run import claim_output
from infra.storage import download_folder, exists, join, write_bytes
from training.models import load_model
from training.restore import SamplingConfig, restore_runs
from training.train import model_id


class RestoreConfig(Config):
    """What a restoration depends on, besides the images and the model."""

    num_runs: int = Field(1, ge=1)
    seed: int = 0
    scale: int = Field(4, ge=1, le=8)
    sampling: SamplingConfig = SamplingConfig()


def restore(source: str, output: str, model_uri: str, config: RestoreConfig) -> int:
    """Restore one file, or all images below a folder or s3:// prefix; returns how many images there are.

    Writes OUT/NAME.png, or OUT/runs/NN/NAME.png for several runs, and OUT/run.json. What is there is kept. A file that
    cannot be used is passed over; PartialResultError names them at the end.
    """
    names = {source: Path(source).stem} if exists(source) else _names(source)
    inputs = {"model": model_id(model_uri)}
    claim_output(output, config, job="restore", inputs=inputs, libraries=("torch", "diffusers", "numpy", "pillow"))
    failures: list[str] = []
    model = None
    with progress("restoring", len(names)) as advance, tempfile.TemporaryDirectory(prefix="ccsr-model-") as folder:
        for uri, name in names.items():
            places = {run: _place(output, name, run, config.num_runs) for run in range(config.num_runs)}
            missing = [run for run, place in places.items() if not exists(place)]
            if missing:
                model = model or load_model(download_folder(model_uri, Path(folder)))
                try:
                    lr = read_image(uri)
                    size = (lr.shape[0] * config.scale, lr.shape[1] * config.scale)
                    images = restore_runs(model, lr, size, config.sampling, seed=config.seed, key=name, runs=missing)
                    for run, image in zip(missing, images, strict=True):
                        write_bytes(places[run], encode_png(image))
                except CcsrError as error:
                    failures.append(f"{uri}: {error.what}")
            advance(1, name)
    if failures:
        raise PartialResultError(
            f"{len(failures)} of {len(names)} images could not be restored; the first: {failures[0]}",
            where=source,
            todo="repair or remove these files and run the same command again; the others are done",
        )
    return len(names)


def _names(source: str) -> dict[str, str]:
    """URI -> output name (without suffix): the path below `source`, told apart where only the suffix differs."""
    root = source.rstrip("/")
    plain = {uri: uri.removeprefix(root).lstrip("/").rsplit(".", 1)[0] for uri in list_images(source)}
    taken = Counter(plain.values())
    return {
        uri: name if taken[name] == 1 else f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
        for uri, name in plain.items()
    }


def _place(output: str, name: str, run: int, num_runs: int) -> str:
    return join(output, f"{name}.png") if num_runs == 1 else join(output, "runs", f"{run:02d}", f"{name}.png")
