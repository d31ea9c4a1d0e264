"""Files of other people's making: names of published pairs, damaged zips, names that are not UTF-8, missing folders."""

import os
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from photos import make_shard_set, photo, save_photos, shard_config

from degradation import degrade, load_preset
from evaluation.config import FolderSet, OutputsMethod
from evaluation.inputs import find_outputs, load_sets
from infra import CcsrError, DataError, rng_for
from infra.imaging.images import encode_png
from infra.run import claim_output
from pipelines.estimate.shards import estimate_shards
from pipelines.sets.verify import verify
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.inputs.zips import list_members, read_member
from pipelines.sharding.reports.card import write_card
from pipelines.sharding.sources import list_sources


def published(folder: Path, hr: str, lr: str, count: int = 2) -> None:
    for number in range(count):
        image = photo(64, 96, seed=number)
        for name, pixels in ((hr, image), (lr, degrade(image, load_preset("bicubic"), rng_for(0, number)).lr)):
            place = folder / name.format(number)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(encode_png(pixels))


@pytest.mark.parametrize(
    ("hr", "lr", "key"),
    [
        ("HR/DSC_{}_x4.png", "LR/DSC_{}_x1.png", "DSC_0"),  # DRealSR
        ("HR/Canon_{}_HR.png", "LR/Canon_{}_LR4.png", "Canon_0"),  # RealSR
        ("HR/000{}.png", "LR/000{}x4.png", "0000"),  # DIV2K
        ("HR/shot_{}_x2.png", "LR/shot_{}_x2.png", "shot_0_x2"),  # names that are equal keep what looks like a mark
    ],
)
def test_the_names_of_published_pairs_are_paired_everywhere(hr: str, lr: str, key: str, tmp_path: Path) -> None:
    published(tmp_path, hr, lr)
    source = {"kind": "pairs", "name": "real", "hr": f"{tmp_path}/HR", "lr": f"{tmp_path}/LR"}
    values = {"job": "shard", "output": "out", "sources": [source], "degradation": None}
    found = list_sources(ShardConfig.model_validate(values).sources)
    assert [Path(file.lr_uri).name for file in found] == [Path(lr.format(number)).name for number in range(2)]
    keys = [image.key for image in load_sets([FolderSet(lr=f"{tmp_path}/LR", hr=f"{tmp_path}/HR")]).images]
    assert keys[0] == key
    for folder in ("HR", "LR"):
        assert set(
            find_outputs(OutputsMethod(kind="outputs", name="o", outputs=f"{tmp_path}/{folder}"), keys, 2)
        ) == set(keys)


def test_a_decoder_of_a_zip_may_raise_anything(tmp_path: Path) -> None:
    """Bytes of members and of the directory changed, one after another: a picture, a reason or an error of ours."""
    rng = rng_for(0, "zips")
    good = encode_png(photo(32, 32))
    for number, kind in enumerate([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA] * 60):
        archive = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(archive, "w", kind) as file:
            for name in ("a.png", "b.png"):
                file.writestr(name, good)
        data = bytearray(archive.read_bytes())
        end = len(data)
        for place in rng.integers(*((0, end), (end - 150, end))[number % 2], 3):
            data[place] = rng.integers(256)
        archive.write_bytes(data)
        with suppress(CcsrError):
            for name in list_members(str(archive)):
                read_member(str(archive), name)


def test_names_that_are_not_utf8_are_sharded_and_described(tmp_path: Path) -> None:
    """Two names, equal but for bytes that are not UTF-8, get different keys; one file is broken."""
    folder = tmp_path / "photos"
    save_photos(folder, [(64, 64)])
    for number, byte in enumerate((b"\xe9", b"\xe8", b"\xff")):
        name = os.fsdecode(b"caf" + byte + b".png")
        (folder / name).write_bytes(encode_png(photo(64, 64, number)) if number < 2 else b"")
    (folder / "写真.png").write_bytes(encode_png(photo(64, 64, 5)))
    manifest = make_shard_set(shard_config(folder, tmp_path / "out", degradation="bicubic"))
    assert len({entry.key for entry in manifest.entries}) == 4
    assert verify(manifest.uri) == manifest
    claim_output(manifest.uri, shard_config(folder, tmp_path / "out"), job="shard", inputs={}, libraries=())
    write_card(manifest)
    assert "caf\\udcff.png" in (tmp_path / "out" / "DATA_CARD.md").read_text()
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / os.fsdecode(b"caf\xe9.png")).write_bytes(encode_png(photo(64, 64)))
    (file,) = list_sources(shard_config(alone, "out").sources)
    assert file.key in {entry.key[:-6] for entry in manifest.entries}


def test_an_estimate_of_a_missing_folder_says_so(tmp_path: Path) -> None:
    for path in ("absent", "absent/*.png"):
        with pytest.raises(DataError, match="does not exist"):
            estimate_shards(shard_config(tmp_path / path, tmp_path / "out"))
