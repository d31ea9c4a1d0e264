"""How Ray is started: a failure's whole cause, no need of HOME, a quiet stderr, and GPUs that are counted first."""

import os

import pytest

from infra import ClusterError, ConfigError
from infra.process.ray_runtime import RayConfig, ray_cluster
from infra.process.ray_start import local_token, without_log_level


@pytest.fixture(autouse=True)
def own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.mark.parametrize(("address", "what"), [(None, "Ray did not start"), ("there:6379", "Ray cannot be reached")])
def test_the_whole_cause_of_a_failed_start_is_named(
    address: str | None, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("the node timed out:\nsee its log " + "x" * 400 + " end") from PermissionError("/tmp/ray")

    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(ClusterError) as caught:
        ray_cluster(RayConfig(address=address)).__enter__()
    assert caught.value.what.startswith(f"{what} (the node timed out: see its log xxx")
    assert caught.value.what.endswith(" end; because: /tmp/ray)")
    assert ("check the address" in caught.value.todo) == (address is not None)


def test_a_cluster_here_needs_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would write its token below HOME."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    seen = {}
    monkeypatch.setattr("ray.init", lambda **_: seen.update(os.environ))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with ray_cluster(RayConfig()):
        pass
    assert len(seen["RAY_AUTH_TOKEN"]) == 32
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the user's")
    with local_token():
        assert os.environ["RAY_AUTH_TOKEN"] == "the user's"


def test_the_line_about_the_log_level_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with without_log_level():
        os.write(2, b"before\n[2026 I 1 1] logging.cc:303: Set ray log level from environment variable X to 3\nafter\n")
    os.write(2, b"end\n")
    assert capfd.readouterr().err == "before\nafter\nend\n"


def test_missing_gpus_are_reported_before_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ClusterError, match="needs 2 GPUs, this machine has 1") as caught:
        ray_cluster(RayConfig(), num_gpus=2).__enter__()
    assert "runtime.device: cpu" in caught.value.todo


def test_a_job_servers_address_is_not_taken_for_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ConfigError, match="address of a job server") as caught, ray_cluster(RayConfig()):
        pass
    assert caught.value.where == "RAY_ADDRESS: http://head:8265"
    assert "RAY_API_SERVER_ADDRESS" in caught.value.todo
