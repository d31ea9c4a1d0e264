"""When an output belongs to a config: run.json alone claims nothing, and work under another config refuses it."""

from pathlib import Path

import pytest
import typer
import yaml

from infra import ConfigError
from infra.files.publish import write_bytes
from infra.run import check_claim, claim_output, read_run
from pipelines.cli.main import app
from pipelines.cli.needs import needs_of
from tests.training_runs import train_config

CCSR = typer.main.get_command(app)
WORK = {
    "shard": "shards/000000.tar",
    "train": "checkpoints/000000000004/state.json",
    "evaluate": "records/m/a.json",
    "restore": "a.png",
}


@pytest.mark.parametrize("job", WORK)
def test_run_json_alone_never_refuses_a_corrected_config(job: str, tmp_path: Path) -> None:
    def claim(**changes: int) -> str:
        config = train_config("set", tmp_path, num_updates=3, **changes)
        return claim_output(str(tmp_path), config, job=job, inputs={}, libraries=())["fingerprint"]

    first = claim()
    for leftover in (
        ".writable-0",
        ".hidden/x",
        "mlflow.db",
        "mlflow.json",
        "mlartifacts/1/x",
    ):  # of a start before any work
        write_bytes(str(tmp_path / leftover), b"")
    second = claim(seed=1)
    assert second != first
    assert not (tmp_path / "mlflow.json").exists(), "another config is another run of MLflow"
    assert read_run(str(tmp_path))["fingerprint"] == second == claim(seed=1)
    check_claim(str(tmp_path), second)
    with pytest.raises(ConfigError, match="another config has begun to use this output"):
        check_claim(str(tmp_path), first)
    write_bytes(str(tmp_path / WORK[job]), b"")
    with pytest.raises(ConfigError) as caught:
        claim(seed=2, crop_px=64)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["    config.crop_px: 32 -> 64", "    config.seed: 1 -> 2"]
    assert len(lines) == 5
    assert read_run(str(tmp_path))["fingerprint"] == second


def test_submit_reports_an_output_of_another_config_before_anything_is_sent(s3: str, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    config = train_config("s3://bucket/set", s3, num_updates=3)
    path.write_text(yaml.safe_dump({**config.model_dump(mode="json", exclude_defaults=True), "job": "train"}))
    needs_of(CCSR, ["train", "-c", str(path)])
    claim_output(s3, config, job="train", inputs={}, libraries=())
    needs_of(CCSR, ["train", "-c", str(path), "--set", "seed=1"])
    write_bytes(f"{s3}/{WORK['train']}", b"")
    needs_of(CCSR, ["train", "-c", str(path), "--set", "num_updates=5", "--set", "runtime.log_every=7"])
    with pytest.raises(ConfigError, match=r"config\.seed: 0 -> 1\n"):
        needs_of(CCSR, ["train", "-c", str(path), "--set", "seed=1"])
    shard = str(Path(__file__).parents[2] / "configs" / "demo" / "shard_train.yaml")
    with pytest.raises(ConfigError, match="job: train -> shard"):
        needs_of(CCSR, ["shard", "-c", shard, "--set", f"output={s3}"])
    with pytest.raises(ConfigError, match="job: train -> restore"):
        needs_of(CCSR, ["restore", "s3://bucket/in", s3, "--model", "m"])
