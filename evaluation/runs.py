"""`ccsr runs`: MLflow's runs of this project with their key numbers and models."""

from datetime import datetime
from typing import Any

from evaluation.metrics.names import metric_direction
from infra.display.table import Table, cell
from infra.errors import DataError
from infra.mlflow.models import MODEL_TAG
from infra.mlflow.server import TrackingConfig, is_missing, mlflow_errors, tracking_uri

KEY_NUMBERS = ("psnr_y", "l_std", "lpips")
MAX_RUNS = 1000  # the newest


def runs_table(tracking: TrackingConfig, experiment: str | None = None, sort: str | None = None) -> Table:
    """A row per run of ccsr, the newest first; with `sort` those that have that metric, the best first.

    A training run's numbers are its last validation's. DataError for an unknown experiment or metric and where there is
    no database, ClusterError where MLflow does not answer.
    """
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(tracking, make_folder=False)
    if is_missing(uri):
        raise DataError("there is no MLflow database", where=uri, todo="give --mlflow")
    with mlflow_errors(uri):
        client = MlflowClient(uri)
        experiments = {one.experiment_id: one.name for one in client.search_experiments()}
        chosen = [number for number, name in experiments.items() if experiment in (None, name)]
        if not chosen:
            names = ", ".join(sorted(experiments.values()))
            raise DataError(f"there is no experiment {experiment!r}", where=uri, todo=f"choose one of: {names}")
        runs = client.search_runs(
            chosen, "tags.`ccsr.job` LIKE '%'", max_results=MAX_RUNS, order_by=["attributes.start_time DESC"]
        )
    columns = tuple(dict.fromkeys((*KEY_NUMBERS, *([sort] if sort else []))))
    if sort:
        direction = -1 if sort.endswith("g_std") else metric_direction(sort)
        runs = sorted((run for run in runs if _number(run, sort) is not None), key=lambda run: _number(run, sort))
        runs = runs[::-1] if direction > 0 else runs
        if not runs:
            raise DataError(
                f"no run has the metric {sort!r}", where=uri, todo="give one as l_std, psnr_y or lpips.g_std"
            )
    table = Table(("run", "job", "status", "began", *columns, "model", "experiment", "id"))
    for run in runs:
        began = datetime.fromtimestamp(run.info.start_time / 1000).isoformat(" ", "minutes")
        about = (run.info.run_name, run.data.tags["ccsr.job"], run.info.status, began)
        numbers = (cell(_number(run, name), ".4f") for name in columns)
        table.add(*about, *numbers, run.data.tags.get(MODEL_TAG), experiments[run.info.experiment_id], run.info.run_id)
    return table


def _number(run: Any, name: str) -> Any:
    return run.data.metrics.get(name, run.data.metrics.get(f"validation/{name}"))
