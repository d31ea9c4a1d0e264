"""Where a compared result lies: a result folder, or an MLflow run by its id or name."""

import os
from pathlib import Path

from evaluation.results import EvaluationResult, load_result
from infra.errors import DataError
from infra.mlflow_server import TrackingConfig, mlflow_errors, tracking_uri
from infra.storage import exists, is_s3, join

_NEEDED = ("run.json", "results.parquet", "images.parquet")


def find_result(place: str, tracking: TrackingConfig, scratch: Path) -> EvaluationResult:
    """The result in folder `place`, else of the MLflow run with that id or name (its tables go below `scratch`).

    Raises StorageError for a folder without a result, DataError for a name that no run or several have, ClusterError
    where MLflow does not answer.
    """
    if is_s3(place) or "/" in place or exists(join(place, "run.json")):
        return load_result(place)
    uri = tracking_uri(tracking)
    if uri.startswith("sqlite:///") and not exists(uri.removeprefix("sqlite:///")):  # asking MLflow would make one
        raise DataError(
            f"{place!r} is no result folder, and there is no MLflow database",
            where=uri,
            todo="check the path, or --mlflow",
        )
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    with mlflow_errors(uri):
        client = MlflowClient(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(
            experiments, f"attributes.run_id = '{place}'" if _is_run_id(place) else f"run_name = '{place}'"
        )
        if len(found) != 1:
            listed = ", ".join(run.info.run_id for run in found[:5])
            raise DataError(
                f"{place!r} is no result folder, and {len(found) or 'no'} MLflow runs are called so",
                where=f"{uri}: {listed}" if found else uri,
                todo="give a result folder or the id of one MLflow run" if found else "check the name and --mlflow",
            )
        run_id = found[0].info.run_id
        folder = scratch / run_id
        folder.mkdir(parents=True, exist_ok=True)
        names = {item.path for item in client.list_artifacts(run_id)}
        if not names.issuperset(_NEEDED):
            raise DataError(
                f"the MLflow run {place!r} holds no evaluation result", where=uri, todo="give a run of ccsr evaluate"
            )
        for name in names & {*_NEEDED, "set_metrics.json"}:
            client.download_artifacts(run_id, name, str(folder))
    result = load_result(folder)
    return EvaluationResult(found[0].info.run_name or run_id, result.run, result.methods)


def _is_run_id(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)
