"""Filters: what they measure, what they leave out, and the scores that the index keeps."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from photos import make_shard_set, photo, shard_config
from PIL import Image
from typer.testing import CliRunner

from infra.config import result_part
from infra.imaging.images import decode_image, encode_png
from infra.imaging.pixels import gradient_energy, grey_levels
from infra.shards.shard import SCORES, read_sample
from pipelines.cli.main import app
from pipelines.sets.verify import verify
from pipelines.sharding.screening.filters import scores_of


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return decode_image(buffer.getvalue(), where="")


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    from skimage import data

    return data.astronaut()


def test_blockiness_grows_with_compression_wherever_the_grid_begins(astronaut: np.ndarray) -> None:
    images = [astronaut, *(as_jpeg(astronaut, quality) for quality in (90, 50, 20))]
    for y, x in ((0, 0), (3, 5)):
        values = [scores_of(image[y:, x:])[1] for image in images]
        assert values == sorted(values)
        assert values[0] < 1.1 < values[2]
    assert scores_of(np.full((64, 64, 3), 7, np.uint8)) == (0, 1, 0)
    checks = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((8, 8)))[..., None].repeat(3, -1).astype(np.uint8) * 40
    assert scores_of(checks)[1] == 1, "steps on the grid alone: nothing inside to compare with"


def test_sharpness_falls_with_blur(astronaut: np.ndarray) -> None:
    values = [scores_of(cv2.GaussianBlur(astronaut, (0, 0), sigma))[2] for sigma in (0.3, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    grey = cv2.cvtColor(astronaut, cv2.COLOR_RGB2GRAY).astype(np.float64)
    assert scores_of(astronaut)[2] == pytest.approx(cv2.Laplacian(grey, cv2.CV_64F).var(), rel=1e-3)


def test_filters_count_what_they_leave_out_and_the_index_keeps_scores(tmp_path: Path, astronaut: np.ndarray) -> None:
    images = {
        "good": astronaut[:128, :128],
        "blocky": as_jpeg(astronaut, 10)[:128, :128],
        "blurred": cv2.GaussianBlur(astronaut, (0, 0), 4)[:128, :128],
        "flat": np.full((128, 128, 3), 90, np.uint8),
        "long": photo(96, 400),
        "small": photo(80, 90),
    }
    (tmp_path / "photos").mkdir()
    for name, image in images.items():
        (tmp_path / "photos" / f"{name}.png").write_bytes(encode_png(image))
    plain = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "all", degradation="bicubic"))
    assert plain.num_samples == 6
    filters = {"min_gradient_energy": 4, "max_blockiness": 1.6, "min_sharpness": 20, "min_side_px": 96, "max_aspect": 4}
    config = shard_config(tmp_path / "photos", tmp_path / "some", degradation="bicubic", draws=2, **filters)
    made = make_shard_set(config)
    assert made.facts["dropped"] == {"blocky": 2, "blurred": 2, "flat": 2, "aspect": 2, "small_side": 2}
    assert [entry.key for entry in made.entries] == ["set-good-000-0", "set-good-000-1"]
    assert verify(made.uri) == made
    for one in (plain, made):
        for entry, *scores in zip(one.entries, *(one.index[name].to_pylist() for name in SCORES), strict=True):
            hr = decode_image(read_sample(one.uri, entry)["hr.png"], where="")
            assert scores == pytest.approx(scores_of(hr), rel=1e-6)
            assert scores[0] == pytest.approx(gradient_energy(grey_levels(hr)), rel=1e-3)
    assert not {"max_blockiness", "max_aspect"} & result_part(shard_config("p", "o")).keys()
    assert result_part(config)["max_aspect"] == 4
    result = CliRunner().invoke(app, ["verify", plain.uri, "--stats"])
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.output.splitlines() if "half below" in line] == list(SCORES)
    assert sum(int(line.split()[3]) for line in result.output.splitlines() if " to " in line) == 3 * 6
