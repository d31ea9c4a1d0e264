"""`ccsr evaluate`: Ray actors restore and score images; results go to parquet, pictures, a report and MLflow."""

import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.config import BicubicMethod, EvaluateConfig, Method, ModelMethod, OutputsMethod
from evaluation.metrics.registry import UNAVAILABLE, fid, how_to_get, metric_origins
from evaluation.mlflow_log import log_result
from evaluation.outputs import find_outputs, outputs_id
from evaluation.report.orderings import ORDERINGS, published_orderings
from evaluation.report.page import write_report
from evaluation.report.tables import published_summary
from evaluation.results import SET_METRICS, EvaluationResult, images_schema, load_result, results_schema
from evaluation.scoring import Scorer, ScoreTask, record_uri
from evaluation.sets import EvaluationSet, load_sets
from infra.display.progress import progress
from infra.errors import DataError
from infra.mlflow_server import check_tracking
from infra.publish import write_bytes
from infra.ray_runtime import on_ray
from infra.run import Progress, claim_output
from infra.storage import exists, join, list_files, read_bytes
from infra.tracking import find_model
from training.models import model_id
from training.restore.restore import check_sampling

LIBRARIES = ("torch", "diffusers", "numpy", "opencv-python-headless", "pillow")


def run_evaluate(config: EvaluateConfig, *, log_only: bool = False) -> EvaluationResult:
    """Score every method on every image, write OUT and log it; what an earlier run finished is kept.

    Raises before anything starts where a test set, a model, outputs or weights cannot be used. `log_only`: send the
    complete result in OUT to MLflow, for when its server was away; DataError where there is none.
    """
    if log_only:
        if not exists(join(config.output, "report.html")):
            raise DataError("there is no complete result to log", where=config.output, todo="leave --log-only away")
        result = load_result(config.output)
        log_result(config, result)
        return result
    config, data, outputs, origins = _claimed(config)
    keys = [image.key for image in data.images]
    for metric in (name for name, origin in origins.items() if origin == UNAVAILABLE):
        print(f"{metric} is unavailable here; to have it: {how_to_get(metric)}", file=sys.stderr)
    if not exists(join(config.output, "report.html")):
        check_tracking(config.tracking)
    available = [name for name in config.metrics if origins.get(name) != UNAVAILABLE]
    if not exists(join(config.output, "images.parquet")):
        _score(config, _tasks(config, data, outputs), available)
        _write_tables(config, keys)
    if "fid" in config.metrics and not exists(join(config.output, SET_METRICS)):
        _score_sets(config, data, "fid" in available)
    result = load_result(config.output)
    if config.published:
        orderings = [ordering.to_dict() for ordering in published_orderings(result, config.published)]
        write_bytes(join(config.output, ORDERINGS), json.dumps(orderings, indent=1).encode())
    write_report(config.output)
    log_result(config, result)
    return result


def preview_evaluate(config: EvaluateConfig) -> Progress:
    """What `run_evaluate` would do; raises what it would before it starts. Nothing is written."""
    config, data, *_ = _claimed(config, write=False)
    total, runs = len(config.methods) * len(data.images), sum(_num_runs(method, config) for method in config.methods)
    done = total
    if not exists(join(config.output, "report.html")):
        check_tracking(config.tracking)
        done = len(list_files(join(config.output, "records")))
    what = f"{', '.join(config.metrics)} of {len(config.methods)} methods, {runs * len(data.images):,} pictures"
    return Progress(done, total, "records", f"{len(data.images):,} images", what)


def _num_runs(method: Method, config: EvaluateConfig) -> int:
    return 1 if isinstance(method, BicubicMethod) else config.num_runs


def _claimed(
    config: EvaluateConfig, *, write: bool = True
) -> tuple[EvaluateConfig, EvaluationSet, dict[str, dict[str, list[str]]], dict[str, str]]:
    """The config with its models found, the test set, the outputs by method, and each metric's origin."""
    if config.published:
        published_summary(config.published)
    methods = [
        method.model_copy(update={"model": find_model(method.model, config.tracking)})
        if isinstance(method, ModelMethod)
        else method
        for method in config.methods
    ]
    config = config.model_copy(update={"methods": tuple(methods)})
    data = load_sets(config.data)
    keys = [image.key for image in data.images]
    outputs = {
        method.name: find_outputs(method.outputs, keys, config.num_runs)
        for method in config.methods
        if isinstance(method, OutputsMethod)
    }
    models = {}
    for method in config.methods:
        if isinstance(method, ModelMethod):
            models[method.name] = model_id(method.model)
            check_sampling(method.model, method.sampling)
    origins = metric_origins(config.metrics)
    inputs = {
        "models": models,
        "outputs": {name: outputs_id(found, data.images) for name, found in outputs.items()},
        "metrics": origins,
    }
    facts = {name: getattr(config, name) for name in ("seed", "num_runs", "crop_border", "published")}
    facts["dataset_id"] = data.dataset_id
    claim_output(config.output, config, job="evaluate", inputs=inputs, libraries=LIBRARIES, facts=facts, write=write)
    return config, data, outputs, origins


def _tasks(
    config: EvaluateConfig, data: EvaluationSet, outputs: Mapping[str, Mapping[str, list[str]]]
) -> list[ScoreTask]:
    """One task per (method, image), methods in turn so that an actor seldom changes its model."""
    return [
        ScoreTask(method, image, outputs[method.name][image.key] if method.name in outputs else [])
        for method in config.methods
        for image in data.images
    ]


def _score(config: EvaluateConfig, tasks: list[ScoreTask], available: Sequence[str]) -> None:
    done = set(list_files(join(config.output, "records")))
    pending = [task for task in tasks if record_uri(config.output, task.method.name, task.image.key) not in done]
    with progress("evaluating", len(tasks), done=len(tasks) - len(pending)) as advance:
        scored = on_ray(
            lambda: Scorer(config, available),
            pending,
            config=config.runtime.ray,
            num_actors=config.runtime.num_actors,
            device=config.runtime.device,
            numerics=config.numerics,
            output=config.output,
        )
        for name in scored:
            advance(1, name)


def _write_tables(config: EvaluateConfig, keys: list[str]) -> None:
    metrics = [name for name in config.metrics if name != "fid"]
    rows, images = [], []
    for method in config.methods:
        for key in keys:
            record = json.loads(read_bytes(record_uri(config.output, method.name, key)))
            images.append(record["image"])
            for run in range(record["image"]["num_runs"]):
                values: dict[str, Any] = {name: record["scores"][name][run] for name in metrics}
                rows.append({"method": method.name, "key": key, "run": run, "seed": config.seed, **values})
    for name, table in (
        ("results", pa.Table.from_pylist(rows, schema=results_schema(metrics))),
        ("images", pa.Table.from_pylist(images, schema=images_schema(metrics))),
    ):
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_bytes(join(config.output, f"{name}.parquet"), buffer.getvalue())


def _score_sets(config: EvaluateConfig, data: EvaluationSet, available: bool) -> None:
    """FID of every run of every method against all HR images; a method's number is the mean over its runs."""
    computable = available and len(data.images) > 1 and all(image.hr for image in data.images)
    result = load_result(config.output)
    found: dict[str, dict[str, float | None]] = {name: {"fid": None} for name in result.methods}
    if computable:
        keys = [image.key for image in data.images]
        runs = [(name, run) for name, method in result.methods.items() for run in range(method.num_runs)]
        references = [result.picture("hr", key) for key in keys]

        def score(one: tuple[str, int]) -> tuple[str, float]:
            name, run = one
            return name, fid([result.picture(name, key, run) for key in keys], references, device=config.runtime.device)

        scores = defaultdict(list)
        for name, value in on_ray(
            lambda: score,
            runs,
            config=config.runtime.ray,
            num_actors=config.runtime.num_actors if config.runtime.device == "cuda" else None,
            device=config.runtime.device,
            numerics=config.numerics,
            output=config.output,
        ):
            scores[name].append(value)
        found = {name: {"fid": math.fsum(values) / len(values)} for name, values in scores.items()}
    write_bytes(join(config.output, SET_METRICS), json.dumps(found, sort_keys=True).encode())
