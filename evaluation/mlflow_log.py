"""An evaluation's result in MLflow: parameters, hashes, the training run above it, aggregates, tables, pictures."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.compare import Comparison
from evaluation.config import EvaluateConfig, ModelMethod
from evaluation.results import TRACE, EvaluationResult, method_file
from infra.config import fingerprint_of
from infra.errors import ClusterError, line_of
from infra.mlflow_server import TrackingConfig, mlflow_errors, tracking_uri
from infra.run import git_commit
from infra.storage import exists, join, list_files, read_bytes, read_json
from infra.tracking import PARENT_TAG, Tracker, find_run, track

MAX_LOGGED_IMAGES = 8


def log_result(config: EvaluateConfig, result: EvaluationResult) -> None:
    """Log a complete result folder; again on the same run if it was logged before.

    Raises ClusterError where the server is away, saying how to send the result later.
    """
    tags = {"git.commit": git_commit(), "dataset_id": result.run["dataset_id"]}
    ids = result.run["inputs"]["methods"]
    tags |= {f"model.{method.name}": ids[method.name] for method in config.methods if isinstance(method, ModelMethod)}
    try:
        with track(config.tracking, {**result.run, "fingerprint": _identity(result)}, tags) as tracker:
            tracker.tag(**_training_runs(config))
            tracker.metrics(flat_summary(result.summary))
            _log_artifacts(tracker, config, result)
    except ClusterError as error:
        raise ClusterError(
            f"the result is complete, but MLflow did not take it ({line_of(error)})",
            where=f"{result.folder} to {tracking_uri(config.tracking)}",
            todo="when the server answers: ccsr evaluate -c FILE --log-only",
        ) from error


def log_comparison(comparison: Comparison, results: Sequence[str], tracking: TrackingConfig) -> str:
    """Log a comparison as its own MLflow run, in the first compared run's experiment: every row as CSV, the tables as
    text. Returns the run's id. Raises ClusterError where the server is away.
    """
    from rich.console import Console

    tracking = tracking.model_copy(update={"experiment": _experiment(comparison, tracking)})
    config = {"results": list(results), "baseline": comparison.baseline}
    rows = [[row.candidate, row.metric, row.mean, row.low, row.high] for row in comparison.differences]
    fingerprint = fingerprint_of({"config": config, "rows": rows})
    with (
        track(tracking, {"job": "compare", "fingerprint": fingerprint, "config": config}) as tracker,
        tempfile.TemporaryDirectory(prefix="ccsr-compare-") as folder,
    ):
        comparison.write_csv(Path(folder) / "differences.csv")
        with (Path(folder) / "comparison.txt").open("w", encoding="utf-8") as file:
            for table in comparison.tables():
                Console(file=file, width=120, soft_wrap=True).print(table)
        tracker.artifact(Path(folder))
        return tracker.run_id


def _identity(result: EvaluationResult) -> str:
    """What its MLflow run is found by. The folder takes part: folders with other methods have equal fingerprints."""
    return fingerprint_of({"result": result.run["fingerprint"], "output": result.folder})


def _experiment(comparison: Comparison, tracking: TrackingConfig) -> str:
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(tracking)
    with mlflow_errors(uri):
        client = MlflowClient(uri)
        for result in comparison.results:
            number = result.run.get("mlflow_experiment")
            run_id = None if number else find_run(client, _identity(result))
            number = client.get_run(run_id).info.experiment_id if run_id else number
            if number:
                return client.get_experiment(number).name
    return tracking.experiment


def flat_summary(summary: dict[str, Any]) -> dict[str, float]:
    """METHOD/METRIC -> number; what is unavailable is left out."""
    flat: dict[str, float | None] = {}
    for name, method in summary.items():
        for own in ("l_std", "l_std_equal_sharpness", "num_blurrier", "p_std", "sharpness"):
            flat[f"{name}/{own}"] = method[own]
        for metric, numbers in method["metrics"].items():
            label = metric.replace("+", "_plus")  # MLflow takes no plus sign
            flat |= {f"{name}/{label}": numbers["mean"], f"{name}/g_std_{label}": numbers["g_std"]}
            flat[f"{name}/p_g_std_{label}"] = numbers.get("p_g_std")
    return {key: value for key, value in flat.items() if value is not None}


def _training_runs(config: EvaluateConfig) -> dict[str, str]:
    """Tags that name the MLflow runs in which the models were trained; one such run is the parent of this one."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri(config.tracking))
    tags = {}
    for method in config.methods:
        if not isinstance(method, ModelMethod):
            continue
        place = join(method.model.rstrip("/").rpartition("/")[0] or ".", "run.json")  # of the training run's folder
        if exists(place):
            run_id = find_run(client, read_json(place).get("fingerprint"))
            if run_id:
                tags[f"trained_by.{method.name}"] = run_id
    parents = set(tags.values())
    return tags | ({PARENT_TAG: parents.pop()} if len(parents) == 1 else {})


def _log_artifacts(tracker: Tracker, config: EvaluateConfig, result: EvaluationResult) -> None:
    """The tables, the report, and the pictures of the first images."""
    keys = next(iter(result.methods.values())).keys[:MAX_LOGGED_IMAGES]
    names = ("run.json", "results.parquet", "images.parquet", "report.html", "set_metrics.json", "orderings.json")
    wanted = [place for name in names if exists(place := join(config.output, name))]
    wanted += [method_file(config.output, name) for name in result.methods]
    for place in list_files(join(config.output, "images")):
        if place.rsplit("/", 1)[-1].removesuffix(".png") in {*keys, TRACE}:
            wanted.append(place)
    with tempfile.TemporaryDirectory(prefix="ccsr-artifacts-") as folder:
        for place in wanted:
            target = Path(folder) / place.removeprefix(config.output).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_bytes(place))
        tracker.artifact(Path(folder))
