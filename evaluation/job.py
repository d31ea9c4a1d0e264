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

from evaluation.config import BicubicMethod, EvaluateConfig, GanMethod, Method, ModelMethod, OutputsMethod
from evaluation.inputs import EvaluationImage, EvaluationSet, Outputs, find_outputs, folders_of, load_sets, outputs_id
from evaluation.metrics.registry import UNAVAILABLE, fid, how_to_get, metric_directions, metric_origins
from evaluation.mlflow_results import log_result
from evaluation.report.orderings import ORDERINGS, published_orderings
from evaluation.report.page import write_report
from evaluation.report.tables import published_summary
from evaluation.results import (
    SET_METRICS,
    TRACE,
    EvaluationResult,
    images_schema,
    load_result,
    method_file,
    results_schema,
)
from evaluation.scoring import Scorer, ScoreTask, check_gan, gan_file, load_gan, record_uri
from infra.config import difference, result_part
from infra.display.progress import progress
from infra.errors import ConfigError, DataError
from infra.files.locations import check_output
from infra.files.publish import put_if_absent, write_bytes
from infra.files.storage import exists, join, list_files, read_bytes, read_json, sha256_file
from infra.mlflow.models import find_model
from infra.mlflow.server import check_tracking
from infra.process.ray_runtime import on_ray
from infra.run import Progress, claim_output
from training.config import ModelConfig
from training.models import model_id
from training.restore.seeded_runs import check_sampling

TRACED_IMAGES = 2
NUM_SIZED = 8
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
        absent = [method.name for method in config.methods if method.name not in result.methods]
        if absent:
            what = f"the result lacks the methods {', '.join(absent)}"
            raise DataError(what, where=config.output, todo="leave --log-only away: they alone are computed")
        log_result(config, result)
        return result
    config, data, outputs, origins, ids = _claimed(config)
    keys = [image.key for image in data.images]
    for metric in (name for name, origin in origins.items() if origin == UNAVAILABLE):
        print(f"{metric} is unavailable here; to have it: {how_to_get(metric)}", file=sys.stderr)
    if not exists(join(config.output, "report.html")):
        check_tracking(config.tracking)
    for method in config.methods:
        _claim_method(config.output, method, ids.get(method.name))
    available = [name for name in config.metrics if origins.get(name) != UNAVAILABLE]
    if _tabled(config.output) != [method.name for method in config.methods]:
        _score(config, _tasks(config, data, outputs), available)
        _write_tables(config, keys)
    if "fid" in config.metrics:
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
    config, data, outputs, *_ = _claimed(config, write=False)
    tasks, runs = _tasks(config, data, outputs), sum(_num_runs(method, config) for method in config.methods)
    total, done = len(tasks), len(tasks) - len(_pending(config, tasks))
    if not exists(join(config.output, "report.html")):
        check_tracking(config.tracking)
    what = f"{', '.join(config.metrics)} of {len(config.methods)} methods, {runs * len(data.images):,} pictures"
    return Progress(done, total, "records", f"{len(data.images):,} images", what, _flops(config, data))


def _flops(config: EvaluateConfig, data: EvaluationSet) -> float:
    """Of all restorations by models; the pictures' mean size is that of the first few."""
    from training.run.cost.requirements import restore_flops

    sizes = [image.read()[2] for image in data.images[:NUM_SIZED]]
    pixels = round(sum(height * width for height, width in sizes) / len(sizes))
    models = [method for method in config.methods if isinstance(method, ModelMethod)]
    records = [read_json(join(method.model, "ccsr.json")) for method in models]
    if any(record["preset"] == "custom" for record in records):  # networks that nothing here can build
        return 0.0
    configs = [ModelConfig(**{name: record[name] for name in ModelConfig.model_fields}) for record in records]
    picture = sum(restore_flops(model, method.sampling, pixels) for model, method in zip(configs, models, strict=True))
    return picture * len(data.images) * (config.num_runs + len(config.perturbations))


def _num_runs(method: Method, config: EvaluateConfig) -> int:
    return 1 if isinstance(method, BicubicMethod | GanMethod) else config.num_runs


def _claimed(
    config: EvaluateConfig, *, write: bool = True
) -> tuple[EvaluateConfig, EvaluationSet, dict[str, Outputs], dict[str, str], dict[str, str]]:
    """The config with its models found, the test set, the outputs by method, each metric's origin, and what identifies
    each method's input."""
    if config.published:
        published_summary(config.published)
    methods = [
        method.model_copy(update={"model": find_model(method.model, config.tracking)})
        if isinstance(method, ModelMethod)
        else method
        for method in config.methods
    ]
    config = config.model_copy(update={"methods": tuple(methods)})
    folders = [folder for part in config.data for folder in folders_of(part)]
    others = (method.outputs for method in config.methods if isinstance(method, OutputsMethod))
    check_output(config.output, [*folders, *others])
    data = load_sets(config.data)
    keys = [image.key for image in data.images]
    outputs = {
        method.name: find_outputs(method, keys, config.num_runs, config.perturbations)
        for method in config.methods
        if isinstance(method, OutputsMethod)
    }
    ids: dict[str, str] = {}
    for method in config.methods:
        if isinstance(method, ModelMethod):
            ids[method.name] = model_id(method.model)
            check_sampling(method.model, method.sampling)
        elif isinstance(method, GanMethod):
            ids[method.name] = _gan_id(method.model, data.images[0])
    ids |= {name: outputs_id(found, data.images) for name, found in outputs.items()}
    origins = metric_origins(config.metrics)
    facts = {name: getattr(config, name) for name in ("seed", "num_runs", "convention", "published")}
    facts |= {"dataset_id": data.dataset_id, "directions": metric_directions(config.metrics)}
    inputs = {"metrics": origins}
    claim_output(config.output, config, job="evaluate", inputs=inputs, libraries=LIBRARIES, facts=facts, write=write)
    for method in config.methods:
        _claim_method(config.output, method, ids.get(method.name), write=False)
    return config, data, outputs, origins, ids


def _gan_id(uri: str, image: EvaluationImage) -> str:
    """The sha256 of a network's file, once it has loaded here and fits the test set's scale."""
    lr, _, size = image.read()
    with gan_file(uri) as file:  # which `load_gan` then shares
        check_gan(load_gan(uri), lr, size, where=f"{uri}, image {image.key}")
        return sha256_file(file)


def _claim_method(output: str, method: Method, input_id: str | None, *, write: bool = True) -> None:
    """Write what the method's numbers depend on, or check it: ConfigError where OUT has another method of that name."""
    place = method_file(output, method.name)
    identity = json.loads(json.dumps({"config": result_part(method), "input": input_id}))
    if write:
        put_if_absent(place, json.dumps(identity, indent=2, sort_keys=True).encode())
    changes = difference(read_json(place), identity) if write or exists(place) else []
    if changes:
        raise ConfigError(
            f"the method {method.name!r} of this output was another one: {'; '.join(changes)}",
            where=place,
            todo="give the method another name, or the evaluation another `output`",
        )


def _tabled(output: str) -> list[str]:
    """The methods in OUT's tables, in order; none where there are no tables yet."""
    place = join(output, "images.parquet")
    return pq.read_table(io.BytesIO(read_bytes(place)))["method"].unique().to_pylist() if exists(place) else []


def _tasks(config: EvaluateConfig, data: EvaluationSet, outputs: Mapping[str, Outputs]) -> list[ScoreTask]:
    """One task per (method, image), methods in turn so that an actor seldom changes its model."""
    return [
        ScoreTask(method, image, outputs.get(method.name, {}).get(image.key), config.trace and number < TRACED_IMAGES)
        for method in config.methods
        for number, image in enumerate(data.images)
    ]


def _pending(config: EvaluateConfig, tasks: list[ScoreTask]) -> list[ScoreTask]:
    done = set(list_files(join(config.output, "records")))
    return [task for task in tasks if record_uri(config.output, task.method.name, task.image.key) not in done]


def _score(config: EvaluateConfig, tasks: list[ScoreTask], available: Sequence[str]) -> None:
    pending = _pending(config, tasks)
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
        traces = {}
        for key in keys:
            record = json.loads(read_bytes(record_uri(config.output, method.name, key)))
            images.append(record["image"])
            if record["trace"]:
                traces[key] = record["trace"]
            for run in range(record["image"]["num_runs"]):
                values: dict[str, Any] = {name: record["scores"][name][run] for name in metrics}
                rows.append({"method": method.name, "key": key, "run": run, "seed": config.seed, **values})
        if traces:
            write_bytes(join(config.output, "images", method.name, TRACE), json.dumps(traces).encode())
    for name, table in (
        ("results", pa.Table.from_pylist(rows, schema=results_schema(metrics))),
        ("images", pa.Table.from_pylist(images, schema=images_schema(metrics))),
    ):
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_bytes(join(config.output, f"{name}.parquet"), buffer.getvalue())


def _score_sets(config: EvaluateConfig, data: EvaluationSet, available: bool) -> None:
    """FID of every run of every method against all HR images; a method's number is the mean over its runs."""
    place = join(config.output, SET_METRICS)
    found: dict[str, dict[str, float | None]] = read_json(place) if exists(place) else {}
    result = load_result(config.output)
    missing = {name: method for name, method in result.methods.items() if name not in found}
    if not missing:
        return
    found |= {name: {"fid": None} for name in missing}
    if available and len(data.images) > 1 and all(image.hr for image in data.images):
        keys = [image.key for image in data.images]
        runs = [(name, run) for name, method in missing.items() for run in range(method.num_runs)]
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
        found |= {name: {"fid": math.fsum(values) / len(values)} for name, values in scores.items()}
    write_bytes(place, json.dumps(found, sort_keys=True).encode())
