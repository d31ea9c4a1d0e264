"""`ccsr append`: a grown set is one set over others' shards, read and verified like any; `ccsr export`."""

import json
from pathlib import Path

import numpy as np
import pytest
from photos import make_shard_set, photo, save_photos, shard_config
from PIL import Image
from typer.testing import CliRunner

from infra import ConfigError, DataError
from infra.files.publish import write_bytes
from infra.files.storage import join, list_files, read_bytes
from infra.imaging.images import decode_image
from infra.shards.manifest import Manifest
from infra.shards.shard import image_of, read_sample
from pipelines.cli.main import app
from pipelines.sets.append import append
from pipelines.sets.export_set import LAYOUTS, export
from pipelines.sets.verify import verify


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return join(request.getfixturevalue("s3"), "sets") if request.param == "s3" else str(tmp_path / "sets")


def small_set(tmp_path: Path, output: str, name: str, **changes: object) -> Manifest:
    save_photos(tmp_path / name, [(48, 48), (40, 64), (64, 40)])
    (tmp_path / name / "bad.png").write_bytes(b"x")
    settings = {"degradation": "bicubic", "samples_per_shard": 2, **changes}
    return make_shard_set(shard_config(tmp_path / name, join(output, name), name=name, **settings))


def test_a_set_grows_without_a_copy(output: str, tmp_path: Path) -> None:
    sets = [small_set(tmp_path, output, name) for name in "abc"]
    first = append([one.uri for one in sets[:2]], join(output, "first"))
    grown = append([first.uri, sets[2].uri], join(output, "grown"))
    assert [file.removeprefix(grown.uri) for file in list_files(grown.uri)] == ["/manifest.json"]
    assert grown.num_samples == 9
    assert verify(grown.uri) == grown
    expected = [(one, entry) for one in sets for entry in one.entries]
    for (one, entry), mine in zip(expected, grown.entries, strict=True):
        assert mine.key == entry.key
        assert read_sample(grown.uri, mine) == read_sample(one.uri, entry)
    assert grown.index["key"].to_pylist() == [entry.key for _, entry in expected]
    assert len(grown.facts["quarantined"]) == 3
    assert grown.facts["sources"] == [source for one in sets for source in one.facts["sources"]]
    assert append([first.uri, sets[2].uri], grown.uri) == grown, "safe to repeat"
    assert append([one.uri for one in sets], join(output, "at-once")).dataset_id == grown.dataset_id


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    output = str(tmp_path / "sets")
    one, other = small_set(tmp_path, output, "a"), small_set(tmp_path, output, "b", degradation=None)
    with pytest.raises(DataError, match="the sets differ: scale 4, has_lr True and scale None, has_lr False"):
        append([one.uri, other.uri], join(output, "new"))
    with pytest.raises(DataError, match="3 keys are in an earlier set too, for one a-00-000-0") as caught:
        append([one.uri, one.uri], join(output, "new"))
    assert caught.value.where == one.uri
    with pytest.raises(ConfigError, match="inside an input"):
        append([one.uri], join(one.uri, "new"))
    assert not (tmp_path / "sets" / "new").exists()


def test_a_base_that_changed_is_found(tmp_path: Path) -> None:
    output = str(tmp_path / "sets")
    sets = [small_set(tmp_path, output, name) for name in "ab"]
    new = join(output, "new")
    result = CliRunner().invoke(app, ["append", sets[0].uri, sets[1].uri, "--out", new])
    assert result.output == f"6 samples, dataset {Manifest.load(new).dataset_id}: {new}\n"
    facts = json.loads(Path(new, "manifest.json").read_text())
    write_bytes(join(new, "manifest.json"), json.dumps({**facts, "min_side_px": 1}).encode())
    with pytest.raises(DataError, match="disagrees with its sets: min_side_px"):
        verify(new)
    Path(sets[1].uri, sets[1].facts["shards"][0]["shard"]).unlink()
    with pytest.raises(DataError, match=r"000000\.tar is missing"):
        verify(new)


@pytest.mark.parametrize("layout", ["pairs", "basicsr"])
def test_an_exported_set_is_folders_of_its_images(layout: str, output: str, tmp_path: Path) -> None:
    made = small_set(tmp_path, output, "a")
    folder = join(output, "out", layout)
    result = CliRunner().invoke(app, ["export", made.uri, folder, "--layout", layout])
    assert result.output.endswith(f"3 samples: {folder}\n")
    hr, lr = LAYOUTS[layout]
    keys = [entry.key for entry in made.entries]
    names = [f"{side}/{key}.png" for side in (hr, lr) for key in keys] + ["meta_info.txt"] * (layout == "basicsr")
    assert [file.removeprefix(f"{folder}/") for file in list_files(folder)] == names
    for entry in made.entries:
        members = read_sample(made.uri, entry)
        for side, name in (("hr", hr), ("lr", lr)):
            assert read_bytes(join(folder, name, f"{entry.key}.png")) == image_of(members, side)
    if layout == "basicsr":
        lines = read_bytes(join(folder, "meta_info.txt")).decode().splitlines()
        assert lines == [f"{key}.png ({size},3)" for key, size in zip(keys, ("48,48", "40,64", "64,40"), strict=True)]
    with pytest.raises(ConfigError, match="no layout 'x'"):
        export(made.uri, folder, "x")


def test_whole_jpegs_are_exported_as_they_are_and_to_basicsr_as_png(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(photo(64, 48)).save(tmp_path / "photos" / "j.jpg")
    made = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation=None))
    for layout, name in (("pairs", "hr/set-j-000-0.jpg"), ("basicsr", "GT/set-j-000-0.png")):
        assert export(made.uri, str(tmp_path / layout), layout) == 1
        data = (tmp_path / layout / name).read_bytes()
        source = (tmp_path / "photos" / "j.jpg").read_bytes()
        assert (data == source) == (layout == "pairs")
        assert np.array_equal(decode_image(data, where=""), decode_image(source, where=""))
