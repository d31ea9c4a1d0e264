"""The way to MLflow: its address, whether it answers and takes what a job will log, its refusals in our words."""

import errno
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from infra.config import Config, TrackingLocation, parse_config
from infra.errors import CcsrError, ClusterError, ConfigError, StorageError, line_of
from infra.files.locations import tracking_location

# HTTP statuses of requests that may be taken later: rights, a proxy whose server starts, too many at once.
PASSING = {401, 403, 404, 407, 408, 409, 425, 429}
DELETED = "must be in the 'active' state"
BAD_NAMES = {errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR}
HOST = re.compile(r"([\w.-]+:\d+|localhost|[\w-]+(\.[\w-]+)+)(/.*)?")


def _with_scheme(uri: Any) -> Any:
    """ValueError for a server's address or a database without a scheme: MLflow would make a folder of that name."""
    if isinstance(uri, str) and HOST.fullmatch(uri):
        meant = f"sqlite:///{uri}" if uri.endswith((".db", ".sqlite")) else f"http://{uri}"
        raise ValueError(f"an address of MLflow begins with http://, https:// or sqlite:///, as in {meant}")
    return uri


class TrackingConfig(Config):
    """Where results are logged. Without `uri`: MLFLOW_TRACKING_URI, or `mlflow.db` in the working folder."""

    uri: Annotated[TrackingLocation | None, BeforeValidator(_with_scheme)] = None
    experiment: str = "ccsr"
    run_name: str | None = None


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Field name .register.")  # every class has a method of this name, from ABCMeta

    class TrainTracking(TrackingConfig):
        """Where a training run is logged."""

        register: str | None = Field(
            None, pattern=r"^[\w. -]+(@[\w-]+)?$", description="NAME[@ALIAS] of the best model in MLflow's registry"
        )


def tracking_uri(config: TrackingConfig, *, make_folder: bool = True) -> str:
    """The effective MLflow address; the folder of a sqlite file is created by default."""
    try:
        uri = config.uri or _with_scheme(os.environ.get("MLFLOW_TRACKING_URI")) or "sqlite:///mlflow.db"
        uri = tracking_location(uri)
    except ValueError as error:
        raise ConfigError(str(error), where="MLFLOW_TRACKING_URI", todo="correct the value") from error
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        try:
            if make_folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the MLflow database cannot be made ({error.strerror})", where=str(folder), todo="set tracking.uri"
            ) from error
        uri = f"sqlite:///{folder / uri.rsplit('/', 1)[-1]}"
    return uri


def is_missing(uri: str) -> bool:
    """Whether an address is of a database that is not there yet: asking MLflow would make it."""
    return uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///"))


def fail_soon() -> None:
    """Fail within seconds if the server is unreachable; MLflow's own default is to try for many minutes. ConfigError
    for a variable that it cannot read."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a run, in `--json` too
    from mlflow import environment_variables

    for name in (name for name in sorted(os.environ) if name.startswith("MLFLOW_")):
        try:
            getattr(getattr(environment_variables, name, None), "get", str)()
        except ValueError as error:
            raise ConfigError(
                f"MLflow does not take a setting ({line_of(error)})", where=name, todo="correct or unset it"
            ) from error


def _status(error: BaseException) -> int:
    """The HTTP status of a server's answer, 500 where there was none."""
    response = getattr(error, "response", None)  # of `requests`, for files
    return response.status_code if response is not None else getattr(error, "get_http_status_code", lambda: 500)()


def refused_for_good(error: BaseException) -> bool:
    """Whether MLflow would refuse the same request again: its contents are at fault, not the server's state."""
    if isinstance(error, OSError) and error.errno in BAD_NAMES:
        return True
    if DELETED in str(error):  # a run or an experiment, which can be restored
        return False
    return 400 <= _status(error) < 500 and _status(error) not in PASSING


@contextmanager
def mlflow_errors(where: str) -> Iterator[None]:
    """Raise MLflow's exceptions as ClusterError, with the server's own words if it answered."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    fail_soon()
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        raise _refused(error, where) from error


def _refused(error: Exception, where: str) -> ClusterError:
    words = " ".join(re.sub(r"<[^>]*>", " ", str(error)).split())[:300] or type(error).__name__
    if _unanswered(error):
        return ClusterError(
            f"MLflow does not answer ({words})",
            where=where,
            todo="start the server, check tracking.uri, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or set "
            "tracking.uri to a sqlite:/// file",
        )
    todo = "check tracking.uri, tracking.experiment and the id, then run the same command again"
    if "ENDPOINT_NOT_FOUND" in str(getattr(error, "error_code", "")) or "valid JSON" in words:
        todo = "no MLflow is at this address: add the path under which a proxy serves it, as in http://HOST/mlflow"
    elif _status(error) in (401, 403):
        todo = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    return ClusterError(f"MLflow refused the request ({words})", where=where, todo=todo)


def _unanswered(error: BaseException | None) -> bool:
    from requests import ConnectionError, Timeout

    return error is not None and (
        isinstance(error, ConnectionError | Timeout) or _unanswered(error.__cause__ or error.__context__)
    )


def check_tracking(config: TrackingConfig) -> None:
    """Ask MLflow before a job's work what it would ask at its end. ClusterError where it does not answer, refuses, or
    holds the experiment as deleted. A database that is not there yet is not made."""
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(config, make_folder=False)
    if is_missing(uri):
        return
    try:
        with mlflow_errors(uri):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)  # of an experiment a wrong path says only that there is none
            found = client.get_experiment_by_name(config.experiment)
    except CcsrError:
        raise
    except Exception as error:  # of a database's driver, an address without host
        raise _refused(error, uri) from error
    if found is not None and found.lifecycle_stage == "deleted":
        raise deleted_experiment(config.experiment, found.experiment_id, uri)


def deleted_experiment(name: str, number: str, uri: str, words: str = "") -> ClusterError:
    return ClusterError(
        f"the MLflow experiment {name!r} is deleted{words}",
        where=f"{uri}: experiment {number}",
        todo=f"mlflow experiments restore --experiment-id {number}, or set tracking.experiment anew",
    )


def ping(uri: str) -> str:
    """The version of the MLflow server at an address, or of this machine's MLflow for a database; ClusterError where
    none answers."""
    import mlflow
    import requests
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(parse_config({"uri": uri}, TrackingConfig, where="--mlflow"))
    with mlflow_errors(uri):
        MlflowClient(uri).search_experiments(max_results=1)
        if not uri.startswith(("http://", "https://")):
            return mlflow.__version__
        return requests.get(f"{uri.rstrip('/')}/version", timeout=30).text.strip()
