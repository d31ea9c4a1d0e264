"""A full disk: three lines and exit code 5, nothing half-written counts, and with more space the job resumes."""

import json
import subprocess
from pathlib import Path

import pytest
from shard_jobs import NUM_SHARDS, ShardJob, num_records, require_undisturbed, tmpfs

from infra import StorageError
from infra.files.publish import download, staging, write_bytes
from infra.files.storage import sha256_file
from infra.shards.manifest import ShardRecord, committed, record_uri
from pipelines.export_model import export_diffusers
from tests.training_runs import noise_shards, run_workers, train_config
from training.config import ModelConfig
from training.models import build_model, save_model
from training.run.checkpoint import complete_checkpoints


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    try:
        with tmpfs(folder, "4m"):
            yield folder
    except PermissionError as error:
        pytest.skip(f"mounting a small file system takes root: {error}")


@pytest.mark.slow
def test_a_full_disk_stops_the_job_and_more_space_finishes_it(
    photos: Path, whole: str, address: str, small_disk: Path
) -> None:
    output = str(small_disk / "out")
    code, printed = ShardJob(photos, output, address).run()
    assert code == 5, printed
    what, where, todo = printed[printed.index("error: ") :].splitlines()[:3]
    assert "No space left on device" in what
    assert where.strip().startswith(f"where: {output}/")
    assert todo.strip().startswith("to do: ")
    assert "Traceback" not in printed
    assert 0 < num_records(output) < NUM_SHARDS
    for record in (ShardRecord.read(record_uri(output, index)) for index in committed(output)):
        assert sha256_file(Path(output, record.shard)) == record.sha256
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    code, printed = ShardJob(photos, output, address).run()
    assert code == 0, printed
    require_undisturbed(output, whole)


@pytest.mark.slow
def test_a_disk_that_fills_in_a_checkpoint_ends_all_ranks(small_disk: Path, tmp_path: Path) -> None:
    """The run's own disk, then the one for temporary files; rank 0 alone writes. A checkpoint has several MiB."""
    data = noise_shards(tmp_path / "set")
    places = {str(small_disk / "run"): None, str(tmp_path / "run"): str(small_disk)}
    runs = []
    for number, (output, temporary) in enumerate(places.items()):
        config = train_config(data, output, num_updates=9, runtime={"checkpoint_every": 1})
        values = config.model_dump(mode="json")
        runs.append({"config": values, "losses": str(tmp_path / f"losses-{number}"), "temporary": temporary})
    run_workers(tmp_path, runs)
    for number, output in enumerate(places):
        outcomes = [json.loads((tmp_path / f"losses-{number}.{rank}").read_text()) for rank in range(2)]
        assert [kind for kind, _ in outcomes] == ["StorageError", "OtherRankError"]
        assert outcomes[0][1].startswith(str(small_disk))
        assert complete_checkpoints(output) == []


def test_a_download_that_fills_the_disk_is_not_tried_again(small_disk: Path, s3: str, waits: list[float]) -> None:
    write_bytes(f"{s3}/weights.bin", bytes(5 << 20))
    with pytest.raises(StorageError, match="cannot write: No space left on device") as caught:
        download(f"{s3}/weights.bin", small_disk)
    assert caught.value.where == str(small_disk / "weights.bin")
    assert waits == []
    assert not list(small_disk.iterdir())


def test_a_model_directory_that_fills_the_disk_is_named(small_disk: Path) -> None:
    with pytest.raises(StorageError, match="No space left on device") as caught:
        save_model(build_model(ModelConfig(), 0), small_disk / "model")
    assert caught.value.where == str(small_disk / "model")
    assert not list(small_disk.iterdir())


def test_a_full_temporary_folder_is_named(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with (
        pytest.raises(StorageError, match="No space left on device") as caught,
        staging("s3://bucket/shards/000000.tar") as path,
    ):
        path.write_bytes(bytes(5 << 20))
    assert caught.value.where == str(small_disk)
    assert not list(small_disk.iterdir())


def test_an_export_that_fills_the_temporary_folder_names_it(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    model = str(Path(__file__).parents[2] / "training" / "models" / "tiny_base")
    with pytest.raises(StorageError, match="No space left on device") as caught:
        export_diffusers(model, str(tmp_path / "out"))
    assert caught.value.where == str(small_disk)
    assert not list(small_disk.iterdir())
    assert not (tmp_path / "out").exists()
