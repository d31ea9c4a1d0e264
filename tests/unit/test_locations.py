"""Locations: read by one rule in every config field, argument and setting, and refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from infra import ConfigError
from infra.config import apply_overrides, load_config
from infra.files.locations import check_output, is_inside, location, parse_model, parse_tracking
from infra.mlflow.tracking import TrackingConfig, tracking_uri
from pipelines.cli.main import app
from pipelines.cli.needs import needs_of
from training.config import TrainConfig

CCSR = typer.main.get_command(app)
SOURCE = {"kind": "folder", "name": "a", "path": "photos"}
CONFIGS: dict[str, dict[str, Any]] = {
    "shard": {
        "job": "shard",
        "output": "out",
        "sources": [SOURCE, {"kind": "pairs", "name": "b", "hr": "h", "lr": "l"}],
        "latents": {"model": "m"},
    },
    "train": {
        "job": "train",
        "output": "out",
        "stage": 1,
        "num_updates": 3,
        "init_from": "m",
        "data": ["set", {"path": "other"}],
        "validation": {"data": ["set"]},
        "tracking": {"uri": "sqlite:///m.db"},
    },
    "evaluate": {
        "job": "evaluate",
        "output": "out",
        "data": ["set", {"lr": "lr", "hr": "hr"}],
        "methods": [{"kind": "model", "name": "a", "model": "m"}, {"kind": "outputs", "name": "b", "outputs": "o"}],
        "tracking": {"uri": "sqlite:///m.db"},
    },
    "cluster": {"job": "cluster", "mlflow": {"artifacts": "S3://b/m"}},
}
FIELDS = {
    "cluster": ["mlflow.artifacts"],
    "shard": ["output", "sources.0.path", "sources.1.hr", "sources.1.lr", "latents.model"],
    "train": ["output", "init_from", "data.0", "data.1.path", "validation.data.0", "tracking.uri"],
    "evaluate": ["output", "data.0", "data.1.lr", "data.1.hr", "methods.0.model", "methods.1.outputs", "tracking.uri"],
}
WRONG = [
    "gs://bucket/x",
    "hdfs://host/x",
    "s3a://bucket/x",
    "$HOME/x",
    "${DATA}/x",
    "s3:/bucket/x",
    "file://host/x",
    "",
]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("x", "HERE/x"),
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("./~/x", "HERE/~/x"),
        ("file:///a/b%20c", "/a/b c"),
        ("FILE://localhost/a", "/a"),
        ("file:/a", "/a"),
        ("S3://Bucket/X/", "s3://Bucket/X"),
        ("s3://bucket", "s3://bucket"),
        ("/a/../b//c/", "/b/c"),
        ("a:b", "HERE/a:b"),
        ("set.zip!A/B", "HERE/set.zip!A/B"),
    ],
)
def test_a_location_is_what_it_means(text: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert location(text) == meant.replace("HERE", str(tmp_path)).replace("HOME", "/home/somebody")
    assert location(location(text)) == location(text)


def test_models_and_tracking_have_schemes_beside_these() -> None:
    assert parse_model("RUNS:/abc") == "runs:/abc"
    for text in ("sqlite:///m.db", "http://host:5000/a", "postgresql+psycopg2://u:$x@h/db", "databricks"):
        assert parse_tracking(text).endswith(text)
    assert parse_tracking("HTTPS://Host/A") == "https://Host/A"


def test_the_settings_of_the_environment_are_locations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gs://bucket/x")
    with pytest.raises(ConfigError, match="a location here is one of"):
        tracking_uri(TrackingConfig())
    monkeypatch.setenv("CCSR_WEIGHTS", "$HOME/weights")
    result = CliRunner().invoke(app, ["weights", "list"])
    assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize(("job", "field"), [(job, field) for job, fields in FIELDS.items() for field in fields])
def test_every_field_refuses_what_is_none(job: str, field: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(apply_overrides(CONFIGS[job], [f"{field}={text!r}"])))
    with pytest.raises(ConfigError) as refused:
        CCSR(["config", "show", "-c", str(tmp_path / "run.yaml")], standalone_mode=False)
    assert field in refused.value.where
    assert "location" in refused.value.what or "URI" in refused.value.what


COMMANDS = [
    "demo --out BAD",
    "shard -c BAD",
    "verify BAD",
    "verify x --against BAD",
    "train -c BAD",
    "evaluate -c BAD",
    "estimate -c BAD",
    "compare BAD/x a/b",
    "compare a/b a/b --csv BAD",
    "compare a/b a/b --mlflow BAD",
    "restore BAD out --model m",
    "restore in BAD --model m",
    "restore in out --model BAD",
    "convert BAD --family v2 --base sd21-base",
    "convert out --v1 BAD",
    "convert out --stablesr BAD",
    "convert out --stablesr x --wrapping BAD",
    "convert out --controlnet BAD --vae x",
    "convert out --controlnet x --vae BAD",
    "convert out --family v2 --base BAD",
    "weights list --folder BAD",
    "weights check --folder BAD",
    "weights fetch dinov2 --folder BAD",
    "weights fetch dinov2 --mirror BAD",
    "doctor --storage BAD",
    "doctor --mlflow BAD",
    "cluster render -c BAD --kind slurm",
    "cluster render -c x --kind slurm --out BAD",
    "config show -c BAD",
    "submit -- restore in BAD --model m",
    "submit -- shard -c BAD",
]


@pytest.mark.parametrize("bad", ["gs://bucket/x", "$HOME/x"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_refuses_what_is_none_and_writes_nothing(
    command: str, bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        CCSR(command.replace("BAD", bad).split(), standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


def test_a_config_is_read_from_s3_and_home(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.files.publish import write_bytes

    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (f"{s3}/run.yaml", str(tmp_path / "run.yaml")):
        write_bytes(place, yaml.safe_dump(CONFIGS["train"]).encode())
    for place in (f"{s3}/run.yaml".replace("s3:", "S3:"), "~/run.yaml", f"file://{tmp_path}/run.yaml"):
        assert load_config(location(place), TrainConfig).num_updates == 3


def test_a_job_is_submitted_with_the_location_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIGS["train"]))
    command = ["train", "-c", str(tmp_path / "run.yaml"), "--set"]
    assert needs_of(CCSR, [*command, "output=S3://b/out/"]).outputs == ("s3://b/out",)
    assert needs_of(CCSR, [*command, "output=file:///shared/out"]).outputs == ("/shared/out",)
    with pytest.raises(ConfigError, match="relative output"):
        needs_of(CCSR, [*command, "output=out"])


def test_inside_follows_links_and_names_alike_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert is_inside(f"{tmp_path}/link/out", f"{tmp_path}/in")
    assert not is_inside(f"{tmp_path}/in2", f"{tmp_path}/in")
    assert is_inside("s3://b/in/out", "s3://b/in")
    assert not is_inside("s3://b/inn", "s3://b/in")
    assert not is_inside("/s3/b", "s3://b")
    check_output("/out", ["/in", "s3://b"])
