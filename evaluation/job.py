"""`ccsr evaluate`: Ray actors restore and score images; results go to parquet, pictures, a report and MLflow."""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.config import EvaluateConfig, ModelMethod, OutputsMethod
from evaluation.metrics.registry import UNAVAILABLE, fid, how_to_get, metric_origins
from evaluation.mlflow_log import log_result
from evaluation.outputs import find_outputs, outputs_id
from evaluation.report.orderings import ORDERINGS, published_orderings
from evaluation.report.page import write_report
from evaluation.report.tables import published_summary
from evaluation.results import SET_METRICS, EvaluationResult, images_schema, load_result, results_schema
from evaluation.scoring import Scorer, record_uri
from evaluation.sets import EvaluationSet, load_sets
from infra.display.progress import progress
from infra.errors import DataError
from infra.locations import check_output
from infra.process.numerics import set_numerics
from infra.ray_runtime import cpu_work, lost_worker, on_actors, ray_cluster, user_error
from infra.run import claim_output
from infra.storage import exists, join, list_files, read_bytes, write_bytes
from infra.tracking import find_model
from training.run.driver import model_id

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
    if config.published:
        published_summary(config.published)
    methods = [
        method.model_copy(update={"model": find_model(method.model, config.tracking)})
        if isinstance(method, ModelMethod)
        else method
        for method in config.methods
    ]
    config = config.model_copy(update={"methods": tuple(methods)})
    folders = (path for part in config.data for path in ([part] if isinstance(part, str) else [part.lr, part.hr]))
    others = (method.outputs for method in config.methods if isinstance(method, OutputsMethod))
    check_output(config.output, [*filter(None, folders), *others])
    data = load_sets(config.data)
    keys = [image.key for image in data.images]
    outputs = {
        method.name: find_outputs(method.outputs, keys, config.num_runs)
        for method in config.methods
        if isinstance(method, OutputsMethod)
    }
    models = {method.name: model_id(method.model) for method in config.methods if isinstance(method, ModelMethod)}
    origins = metric_origins(config.metrics)
    inputs = {
        "models": models,
        "outputs": {name: outputs_id(found, data.images) for name, found in outputs.items()},
        "metrics": origins,
    }
    facts = {name: getattr(config, name) for name in ("seed", "num_runs", "crop_border", "published")}
    facts["dataset_id"] = data.dataset_id
    claim_output(config.output, config, job="evaluate", inputs=inputs, libraries=LIBRARIES, facts=facts)
    for metric in (name for name, origin in origins.items() if origin == UNAVAILABLE):
        print(f"{metric} is unavailable here; to have it: {how_to_get(metric)}", file=sys.stderr)
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


def _tasks(
    config: EvaluateConfig, data: EvaluationSet, outputs: Mapping[str, Mapping[str, list[str]]]
) -> list[dict[str, Any]]:
    """One task per (method, image), methods in turn so that an actor seldom changes its model."""
    return [
        {
            "method": number,
            "key": image.key,
            # JSON: Ray's columns could not tell an absent entry from one of another type.
            "image": json.dumps(
                {"image": image.to_dict(), "outputs": outputs[method.name][image.key] if method.name in outputs else []}
            ),
        }
        for number, method in enumerate(config.methods)
        for image in data.images
    ]


def _score(config: EvaluateConfig, tasks: list[dict[str, Any]], available: Sequence[str]) -> None:
    done = set(list_files(join(config.output, "records")))
    pending = [t for t in tasks if record_uri(config.output, config.methods[t["method"]].name, t["key"]) not in done]
    with progress("evaluating", len(tasks), done=len(tasks) - len(pending)) as advance:
        scored = on_actors(
            lambda: Scorer(config, available),
            pending,
            ray_config=config.runtime.ray,
            num_actors=config.runtime.num_actors,
            use_gpu=config.runtime.use_gpu,
            numerics=config.numerics,
            output=config.output,
        )
        for row in scored:
            advance(1, f"{row['method']}: {row['key']}")


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
        with ray_cluster(config.runtime.ray):
            import ray

            device = "cuda" if config.runtime.use_gpu else "cpu"
            keys = [image.key for image in data.images]
            references = [result.picture("hr", key) for key in keys]

            def score(run: list[str]) -> float:
                set_numerics(config.numerics)
                return fid(run, references, device=device)

            remote = ray.remote(**({"num_gpus": 1} if config.runtime.use_gpu else cpu_work(config.runtime.ray)))(score)
            try:
                for name, method in result.methods.items():
                    runs = [[result.picture(name, key, run) for key in keys] for run in range(method.num_runs)]
                    scores = ray.get([remote.remote(run) for run in runs])
                    found[name]["fid"] = sum(scores) / len(scores)
            except ray.exceptions.RayError as error:
                raise user_error(error) or lost_worker(error, config.output) from error
    write_bytes(join(config.output, SET_METRICS), json.dumps(found, sort_keys=True).encode())
