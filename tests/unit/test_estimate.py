"""`ccsr estimate` of a shard config against the set that the config makes."""

from pathlib import Path

import pytest
from photos import make_shard_set, save_photos, shard_config

from infra.errors import DataError
from pipelines.estimate.shards import Amount, estimate_shards, scaled_up, shard_table


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, [(64 + 4 * (number % 5), 64) for number in range(24)])
    return folder


def test_all_files_measured_give_the_sets_own_figures(photos: Path, tmp_path: Path) -> None:
    crop = {"kind": "random", "size_px": 48, "num_per_image": 3}
    config = shard_config(photos, tmp_path / "set", degradation="bicubic", crop=crop, samples_per_shard=10, draws=2)
    estimate = estimate_shards(config, num_files=24)
    assert not (tmp_path / "set").exists()
    manifest = make_shard_set(config)
    assert estimate.num_shards == len(manifest.facts["shards"]) == 15
    assert estimate.samples == Amount(manifest.num_samples, 0) == Amount(144, 0)
    assert estimate.num_bytes == Amount(sum(entry.length_bytes for entry in manifest.entries), 0)
    assert estimate.core_seconds.value > 0


def test_a_part_of_the_files_tells_the_rest_within_its_spread(photos: Path, tmp_path: Path) -> None:
    config = shard_config(photos, tmp_path / "set", degradation="ccsr", runtime={"num_actors": 3})
    estimate = estimate_shards(config, num_files=8)
    assert (estimate.num_measured, estimate.num_files, estimate.num_workers) == (8, 24, 3)
    true = sum(entry.length_bytes for entry in make_shard_set(config).entries)
    assert estimate.num_bytes.spread > 0
    assert abs(estimate.num_bytes.value - true) < 1.5 * estimate.num_bytes.spread
    assert estimate.num_bytes.spread < 0.5 * true
    assert len(shard_table(estimate).rows) == 6
    assert estimate.hash_core_seconds == Amount(0, 0)


def test_looking_for_near_duplicates_is_counted(photos: Path, tmp_path: Path) -> None:
    estimate = estimate_shards(shard_config(photos, tmp_path / "set", degradation="bicubic", dedupe=4), num_files=8)
    assert 0 < estimate.hash_core_seconds.value < estimate.core_seconds.value
    assert "looking for near-duplicates" in str(shard_table(estimate).rows[-2])


def test_files_that_cannot_be_used_count_for_nothing(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64)] * 2)
    for name in ("bad", "worse"):
        (tmp_path / "photos" / f"{name}.png").write_bytes(b"x")
    estimate = estimate_shards(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    assert estimate.samples == Amount(2, 0)
    with pytest.raises(DataError, match="no images"):
        estimate_shards(shard_config(tmp_path / "nothing", tmp_path / "set"))


def test_the_spread_is_two_standard_errors() -> None:
    assert scaled_up([1.0, 3.0], 2) == Amount(4, 0)
    # Two of 200 files: mean 2, deviation sqrt(2), its error 1 by 0.99 of the files unknown.
    assert scaled_up([1.0, 3.0], 200) == Amount(400, pytest.approx(2 * 200 * 0.99**0.5))
    assert scaled_up([5.0], 10).spread > 0
