"""The way to a cluster's job server: its address, its token, its versions and nodes; refusals in our words."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from infra.errors import ClusterError, line_of
from infra.process.ray_runtime import GpuCount, count_gpus
from infra.process.ray_start import use_token

REQUEST_SECONDS = 30
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class ClusterFacts:
    """Facts that a job server reports about its cluster. `nodes`: those alive, as Ray's state API lists them."""

    ray_version: str
    python_version: str
    nodes: list[dict[str, Any]]

    @property
    def gpus(self) -> GpuCount:
        return count_gpus((node["resources_total"], node["labels"]) for node in self.nodes)


def job_server(address: str | None) -> str:
    """The address that is meant, as a URL without a slash at its end."""
    named = address or next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), "127.0.0.1:8265")
    return (named if "://" in named else f"http://{named}").rstrip("/")


def connect(address: str | None) -> Any:
    """A client of the job server. ClusterError where nothing answers there or the token is refused."""
    use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *request: Any, **options: Any) -> Any:
            # Ray's own waits forever for a silent server.
            return super()._do_request(*request, timeout=REQUEST_SECONDS, **options)

    logging.getLogger("ray").setLevel(logging.WARNING)
    place = job_server(address)
    try:
        with _without_addresses():
            return Client(place)
    except AuthenticationError as error:
        raise ClusterError(
            "the cluster refused us: its token is missing or wrong",
            where=place,
            todo="put the cluster's token into ~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN",
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ClusterError(
            f"the cluster's job server does not answer ({line_of(error)})",
            where=place,
            todo="check the address (the dashboard's, usually port 8265) and the tunnel to it",
        ) from error


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Ray would prefer these variables to the address that it is given."""
    hidden = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def cluster_facts(client: Any) -> ClusterFacts:
    """Versions and nodes. ClusterError where the server does not tell them."""
    try:
        about = _get(client, "/api/v0/cluster_metadata")["data"]
        listed = _get(client, "/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        nodes = [node for node in listed if node["state"] == "ALIVE"]
        return ClusterFacts(about["rayVersion"], about["pythonVersion"], nodes)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise ClusterError(
            f"the cluster does not tell its versions and nodes ({type(error).__name__}: {line_of(error)})",
            where=client.get_address(),
            todo="look whether the whole dashboard runs there, then try again",
        ) from error


def _get(client: Any, path: str) -> Any:
    answer = client._do_request("GET", path)
    answer.raise_for_status()
    return answer.json()


def same_release(ours: str, theirs: str) -> bool:
    """Whether two versions of Ray agree in major and minor number."""
    return ours.split(".")[:2] == theirs.split(".")[:2]


def check_version(facts: ClusterFacts, where: str) -> None:
    """ClusterError where the cluster runs another release of Ray than this machine."""
    import ray

    if not same_release(ray.__version__, facts.ray_version):
        raise ClusterError(
            f"Ray {facts.ray_version} runs there, {ray.__version__} is installed here",
            where=where,
            todo=f"give the cluster an image with Ray {ray.__version__}, or install Ray {facts.ray_version} here",
        )
