"""MLflow: one run per job, found again on a resume; only drivers and rank 0 import this."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.config import Config, Location
from infra.errors import ClusterError, StorageError

RUN_TAG = "ccsr.fingerprint"


class TrackingConfig(Config):
    """Where results are logged. Without `uri`: MLFLOW_TRACKING_URI, or `mlflow.db` in the working folder."""

    uri: Location | None = None
    experiment: str = "ccsr"
    run_name: str | None = None


def tracking_uri(config: TrackingConfig) -> str:
    """The effective MLflow address; the folder of a sqlite file is made."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the MLflow database cannot be made ({error.strerror})", where=str(folder), todo="set tracking.uri"
            ) from error
        uri = f"sqlite:///{folder / uri.rsplit('/', 1)[-1]}"
    return uri


class Tracker:
    """One MLflow run. All values go through `log_batch`: one request however many metrics."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    @classmethod
    def connect(cls, uri: str, run_id: str) -> "Tracker":
        """A run that another process began."""
        from mlflow.tracking import MlflowClient

        return cls(MlflowClient(uri), run_id)

    def end(self, status: str) -> None:
        """Close the run as FINISHED or FAILED."""
        self._client.set_terminated(self.run_id, status)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()])

    def tag(self, **tags: str) -> None:
        for name, value in tags.items():
            self._client.set_tag(self.run_id, name, value)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload one file, or a folder's content."""
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(self.run_id, str(path), folder or None)


@contextmanager
def track(config: TrackingConfig, run: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> Iterator[Tracker]:
    """The MLflow run of an output folder (its run.json is `run`): continued if it exists, else begun.

    It ends FINISHED, or FAILED if the body raises. Raises ClusterError if the store cannot be reached.
    """
    tracker = open_tracker(config, run, tags)
    try:
        yield tracker
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.end("FINISHED")


def open_tracker(config: TrackingConfig, run: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> Tracker:
    """Begin or continue the run with this fingerprint in the experiment."""
    import logging

    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # the first use of a sqlite store logs each of its migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(config)
    # A dead server is told within seconds; MLflow's own default is to try for many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            location = None
            if uri.startswith("sqlite:///"):
                location = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()
            experiment_id = client.create_experiment(config.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run['fingerprint']}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
            return Tracker(client, run_id)
        all_tags = {RUN_TAG: run["fingerprint"], "ccsr.job": run["job"], **(tags or {})}
        stage = f"-stage{run['config']['stage']}" if "stage" in run["config"] else ""
        name = config.run_name or f"{run['job']}{stage}-{run['fingerprint'][:8]}"
        run_id = client.create_run(experiment_id, tags=all_tags, run_name=name).info.run_id
        parameters = [Param(k, str(v)[:500]) for k, v in flatten(run["config"]).items()]
        client.log_batch(run_id, params=parameters[:100])
        client.log_dict(run_id, dict(run), "run.json")
    except MlflowException as error:
        raise ClusterError(
            f"MLflow does not answer ({str(error).splitlines()[0][:200]})",
            where=uri,
            todo="start the server, or set tracking.uri to a sqlite:/// file",
        ) from error
    return Tracker(client, run_id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
