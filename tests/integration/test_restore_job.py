"""`ccsr restore --ray`: actors write the pictures of one process, each once, and name what they cannot use."""

from pathlib import Path

import numpy as np
import pytest

from infra import PartialResultError, rng_for
from infra.imaging.images import encode_png, read_image
from pipelines import restore as module
from pipelines.restore import RestoreConfig, RestoreRuntime, restore
from training.config import ModelConfig, SamplingConfig
from training.models import build_model, save_model


@pytest.mark.usefixtures("ray_session")
def test_actors_write_what_one_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(build_model(ModelConfig(family="v2"), 1), tmp_path / "model")
    (tmp_path / "in").mkdir()
    for number in range(3):
        lr = rng_for(number, "lr").integers(0, 256, (16 + 4 * number, 20, 3), dtype=np.uint8)
        (tmp_path / "in" / f"{number}.png").write_bytes(encode_png(lr))
    (tmp_path / "in" / "broken.png").write_bytes(b"nothing")
    monkeypatch.setattr(module, "IMAGES_PER_TASK", 2)  # several tasks
    config = RestoreConfig(num_runs=2, scale=2, sampling=SamplingConfig(num_steps=3))
    for name, runtime in (("one", RestoreRuntime()), ("ray", RestoreRuntime(use_ray=True, num_actors=2))):
        with pytest.raises(PartialResultError, match=r"1 of 4 images .*broken\.png"):
            restore(
                str(tmp_path / "in"),
                str(tmp_path / name),
                str(tmp_path / "model"),
                config.model_copy(update={"runtime": runtime}),
            )
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 6
    assert files == sorted(path.relative_to(tmp_path / "ray") for path in (tmp_path / "ray").rglob("*.png"))
    for file in files:
        difference = read_image(f"{tmp_path}/one/{file}").astype(int) - read_image(f"{tmp_path}/ray/{file}")
        assert np.abs(difference).max() <= 1

    (tmp_path / "in" / "broken.png").unlink()
    (tmp_path / "ray" / files[0]).unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").rglob("*.png")}
    assert restore(str(tmp_path / "in"), str(tmp_path / "ray"), str(tmp_path / "model"), config) == 3
    assert (tmp_path / "ray" / files[0]).is_file()
    assert times == {path: path.stat().st_mtime_ns for path in times}
