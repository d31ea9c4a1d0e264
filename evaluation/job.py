"""`ccsr evaluate`: Ray actors restore and score images; results go to parquet, pictures, a report and MLflow."""

import dataclasses
import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.config import BicubicMethod, EvaluateConfig, Method, ModelMethod
from evaluation.metrics import niqe, psnr_y, sharpness, ssim_y
from evaluation.report import write_report
from evaluation.results import EvaluationResult, image_row, images_schema, load_result, results_schema
from evaluation.stability import StabilityAccumulator
from infra.errors import DataError
from infra.images import decode_image, encode_png, resize_bicubic
from infra.manifest import Manifest
from infra.progress import progress
from infra.ray_runtime import lost_worker, ray_cluster, user_error
from infra.run import claim_output
from infra.shards import Entry, read_sample
from infra.storage import download_folder, exists, join, list_files, put_if_absent, read_bytes, write_bytes
from infra.tracking import track
from training.restore import restore_runs
from training.train import git_commit, model_id

LIBRARIES = ("torch", "diffusers", "numpy", "opencv-python-headless", "pillow")
MAX_LOGGED_IMAGES = 8


def run_evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Score every method on every image, write OUT and log it; what an earlier run finished is kept.

    Raises before anything starts where a shard set or model cannot be used.
    """
    manifests = [Manifest.load(uri) for uri in config.data]
    models = {method.name: model_id(method.model) for method in config.methods if isinstance(method, ModelMethod)}
    dataset_id = "+".join(manifest.dataset_id for manifest in manifests)
    facts = {name: getattr(config, name) for name in ("seed", "num_runs", "crop_border")} | {"dataset_id": dataset_id}
    run = claim_output(
        config.output, config, job="evaluate", inputs={"models": models}, libraries=LIBRARIES, facts=facts
    )
    tasks = _tasks(config, manifests)
    if not exists(join(config.output, "images.parquet")):
        _score(config, tasks)
        _write_tables(config, tasks)
    result = load_result(config.output)
    write_report(config.output)
    with track(config.tracking, run, {"git.commit": git_commit(), "dataset_id": dataset_id}) as tracker:
        tracker.metrics(_flat_summary(result.summary))
        _log_artifacts(tracker, config, result)
    return result


def _tasks(config: EvaluateConfig, manifests: list[Manifest]) -> list[dict[str, Any]]:
    """One task per (method, image), methods in turn so that an actor seldom changes its model."""
    images = [(manifest.uri, entry) for manifest in manifests for entry in manifest.entries]
    key, count = Counter(entry.key for _, entry in images).most_common(1)[0]
    if count > 1:
        raise DataError(f"two images have the key {key}", where=", ".join(config.data), todo="evaluate them apart")
    for manifest in manifests:
        if not manifest.facts["has_lr"]:
            raise DataError("these shards hold no LR images", where=manifest.uri, todo="shard with a degradation")
    return [
        {"method": number, "uri": uri, "entry": dataclasses.asdict(entry)}
        for number in range(len(config.methods))
        for uri, entry in images
    ]


def _record_uri(config: EvaluateConfig, task: dict[str, Any]) -> str:
    return join(config.output, "records", config.methods[task["method"]].name, f"{task['entry']['key']}.json")


def _score(config: EvaluateConfig, tasks: list[dict[str, Any]]) -> None:
    done = set(list_files(join(config.output, "records")))
    pending = [task for task in tasks if _record_uri(config, task) not in done]
    with progress("evaluating", len(tasks), done=len(tasks) - len(pending)) as advance:
        if not pending:
            return
        with ray_cluster(config.runtime.ray):
            import ray
            from ray.data import ActorPoolStrategy, DataContext

            logging.getLogger("ray.data").setLevel(logging.ERROR)
            DataContext.get_current().enable_progress_bars = False

            class ConfiguredScorer(Scorer):
                # Ray warns of constructor arguments, because they would be lost with the object store's node.
                def __init__(self) -> None:
                    super().__init__(config)

            scored = ray.data.from_items(pending, override_num_blocks=len(pending)).map(
                ConfiguredScorer,
                compute=ActorPoolStrategy(size=config.runtime.num_actors),
                num_cpus=0 if config.runtime.use_gpu else 1,
                num_gpus=1 if config.runtime.use_gpu else 0,
            )
            try:
                for row in scored.iter_rows():
                    advance(1, f"{row['method']}: {row['key']}")
            except ray.exceptions.RayError as error:
                raise user_error(error) or lost_worker(error, config.output) from error


class Scorer:
    """A Ray actor: restores one image by one method, scores it, stores pictures, and commits the record last."""

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._loaded: tuple[str, Any] = ("", None)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        config, method, entry = self._config, self._config.methods[task["method"]], Entry(**task["entry"])
        key, where = entry.key, f"{task['uri']}: {entry.key}"
        members = read_sample(task["uri"], entry)
        hr, lr = (decode_image(members[f"{name}.png"], where=where) for name in ("hr", "lr"))
        folder = join(config.output, "images")
        put_if_absent(join(folder, "hr", f"{key}.png"), members["hr.png"])
        put_if_absent(join(folder, "lr", f"{key}.png"), members["lr.png"])
        stability = StabilityAccumulator(crop_border=config.crop_border)
        scores: dict[str, list[float | None]] = {name: [] for name in config.metrics}
        sharp: list[float] = []
        for run, image in enumerate(self._restored(method, hr, lr, key)):
            write_bytes(join(folder, method.name, f"{run:02d}", f"{key}.png"), encode_png(image))
            stability.add(image)
            sharp.append(sharpness(image, hr, crop_border=config.crop_border))
            for name in config.metrics:
                scores[name].append(_metric(name, image, hr, config.crop_border))
        l_std = 0.0
        if len(sharp) > 1:
            l_std = stability.l_std()
            levels = np.rint(np.clip(stability.map(), 0, 1) * 65535).astype(np.uint16)
            write_bytes(join(folder, method.name, "l_std", f"{key}.png"), encode_png(levels))
        row = image_row(method.name, key, hr.shape[:2], scores, l_std=l_std, sharpness=float(np.mean(sharp)))
        record = json.dumps({"scores": scores, "image": row}, sort_keys=True).encode()
        put_if_absent(_record_uri(config, task), record)
        return {"method": method.name, "key": key}

    def _restored(self, method: Method, hr: np.ndarray, lr: np.ndarray, key: str) -> Iterator[np.ndarray]:
        height, width = hr.shape[:2]
        if isinstance(method, BicubicMethod):
            yield resize_bicubic(lr, width, height)
            return
        yield from restore_runs(
            self._model(method.model),
            lr,
            (height, width),
            method.sampling,
            seed=self._config.seed,
            key=key,
            runs=range(self._config.num_runs),
            runs_at_once=self._config.runtime.runs_at_once,
        )

    def _model(self, uri: str) -> Any:
        import torch

        from training.models import load_model

        if self._loaded[0] != uri:
            torch.set_num_threads(self._config.runtime.threads_per_actor)
            device = "cuda" if self._config.runtime.use_gpu else "cpu"
            with tempfile.TemporaryDirectory(prefix="ccsr-model-") as folder:
                self._loaded = (uri, load_model(download_folder(uri, Path(folder)), device=device))
        return self._loaded[1]


def _metric(name: str, sr: np.ndarray, hr: np.ndarray, crop_border: int) -> float | None:
    if name == "niqe":
        try:
            return niqe(sr, crop_border=crop_border)
        except DataError:  # too small or too flat for this metric: unavailable, not a number
            return None
    return {"psnr_y": psnr_y, "ssim_y": ssim_y}[name](sr, hr, crop_border=crop_border)


def _write_tables(config: EvaluateConfig, tasks: list[dict[str, Any]]) -> None:
    rows, images = [], []
    for task in tasks:
        record = json.loads(read_bytes(_record_uri(config, task)))
        images.append(record["image"])
        method = config.methods[task["method"]].name
        num_runs = record["image"]["num_runs"]
        for run in range(num_runs):
            values: dict[str, Any] = {name: record["scores"][name][run] for name in config.metrics}
            rows.append({"method": method, "key": task["entry"]["key"], "run": run, "seed": config.seed, **values})
    for name, table in (
        ("results", pa.Table.from_pylist(rows, schema=results_schema(config.metrics))),
        ("images", pa.Table.from_pylist(images, schema=images_schema(config.metrics))),
    ):
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_bytes(join(config.output, f"{name}.parquet"), buffer.getvalue())


def _flat_summary(summary: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float | None] = {}
    for name, method in summary.items():
        flat |= {f"{name}/l_std": method["l_std"], f"{name}/sharpness": method["sharpness"]}
        for metric, numbers in method["metrics"].items():
            flat |= {f"{name}/{metric}": numbers["mean"], f"{name}/g_std_{metric}": numbers["g_std"]}
    return {key: value for key, value in flat.items() if value is not None}


def _log_artifacts(tracker: Any, config: EvaluateConfig, result: EvaluationResult) -> None:
    """The tables, the report, and the pictures of the first images."""
    keys = next(iter(result.methods.values())).keys[:MAX_LOGGED_IMAGES]
    wanted = [join(config.output, name) for name in ("run.json", "results.parquet", "images.parquet", "report.html")]
    for place in list_files(join(config.output, "images")):
        if place.rsplit("/", 1)[-1].removesuffix(".png") in keys:
            wanted.append(place)
    with tempfile.TemporaryDirectory(prefix="ccsr-artifacts-") as folder:
        for place in wanted:
            target = Path(folder) / place.removeprefix(config.output).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_bytes(place))
        tracker.artifact(Path(folder))
