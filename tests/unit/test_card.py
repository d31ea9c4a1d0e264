"""The data card: what it says is in the set, its code reads the set, and writing it costs a bounded sample."""

import os
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from photos import make_shard_set, photo, save_photos, shard_config

from infra.files.storage import join, list_files, read_bytes
from infra.imaging.images import decode_image, encode_png
from infra.imaging.pixels import gradient_energy, grey_levels
from infra.run import claim_output
from infra.shards.manifest import Manifest
from pipelines.sets.verify import verify
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import LIBRARIES, run_shard
from pipelines.sharding.reports import card
from pipelines.sharding.reports.card import evenly, write_card


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, [(64, 64), (70, 90), (99, 83)])
    (folder / "a|b.png").write_bytes(b"no picture")
    return folder


def finished(config: ShardConfig) -> Manifest:
    manifest = make_shard_set(config)
    claim_output(config.output, config, job="shard", inputs={"source_id": "x"}, libraries=LIBRARIES)
    return manifest


def written(uri: str) -> dict[str, bytes]:
    return {name: read_bytes(join(uri, name)) for name in ("DATA_CARD.md", "contact_sheet.jpg")}


def test_the_card_says_what_is_in_the_set(photos: Path, tmp_path: Path) -> None:
    manifest = finished(shard_config(photos, tmp_path, degradation="bicubic", samples_per_shard=2))
    facts = {
        "sources": [
            {
                "name": "a",
                "kind": "folder",
                "dataset": "D",
                "num_files": 4,
                "expected_files": 8,
                "licence": "x|y",
            },
            {"name": "b", "kind": "pairs", "dataset": None, "num_files": 1, "expected_files": None, "licence": None},
        ],
        "dropped": {"flat": 12},
    }
    write_card(Manifest(manifest.uri, {**manifest.facts, **facts}))
    text = written(manifest.uri)["DATA_CARD.md"].decode()
    for line in (
        f"# Data card of {manifest.dataset_id}",
        "| samples | 3 in 2 shards |",
        "| HR images | 64 x 64 px to 80 x 96 px, the median 88 x 68 px |",
        "| crop | kind whole |",
        "| scale | 4 |",
        "| degradation | bicubic |",
        "| set aside | 1 quarantined, 12 dropped |",
        r"| a | D | 4 | 8 | x\|y |",
        "| b | pairs | 1 | not stated | not stated |",
        "| unreadable | 1 | quarantined |",
        "| flat | 12 | dropped |",
        "  degradation: bicubic",
    ):
        assert f"\n{line}\n" in f"\n{text}", line
    assert re.search(r"\n\| a\\\|b\.png \| unreadable \| .* \| [0-9a-f]{12} \|\n", text)
    for title in ("mean brightness", "gradient energy"):
        histogram = text.split(title)[1].split("```")[0]
        assert sum(int(line.split()[3]) for line in histogram.splitlines()[1:]) == 3
    assert verify(manifest.uri) == manifest
    assert str(tmp_path) not in text


@pytest.mark.parametrize("degradation", ["bicubic", None])
def test_the_cards_code_reads_the_set(
    photos: Path,
    tmp_path: Path,
    degradation: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = finished(shard_config(photos, tmp_path / "set", degradation=degradation, samples_per_shard=2))
    write_card(manifest)
    code = written(manifest.uri)["DATA_CARD.md"].decode().split("```python\n")[1].split("```")[0]
    assert ("lr" in code) == (degradation is not None)
    (tmp_path / "read.py").write_text(code)
    monkeypatch.chdir(manifest.uri)
    runpy.run_path(str(tmp_path / "read.py"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" {")[0] for line in lines] == (
        ["(64, 64, 3)", "(68, 88, 3)", "(96, 80, 3)"] if degradation else ["(64, 64, 3)", "(70, 90, 3)", "(99, 83, 3)"]
    )
    assert [entry.key in line for entry, line in zip(manifest.entries, lines, strict=True)] == [True] * 3


def test_the_card_is_the_same_wherever_the_set_lies(photos: Path, tmp_path: Path, s3: str) -> None:
    cards = []
    for output in (str(tmp_path / "here"), join(s3, "there")):
        config = shard_config(photos, output, degradation="ccsr", draws=2)
        write_card(finished(config))
        write_card(Manifest.load(output))
        cards.append(written(output))
    assert cards[0] == cards[1]


def test_a_card_that_is_missing_is_written_by_the_next_run(photos: Path, tmp_path: Path) -> None:
    """The set is complete, so that no Ray is needed."""
    config = shard_config(photos, tmp_path / "set", degradation="bicubic", runtime={"max_failed_fraction": 0.5})
    manifest = finished(config)
    shutil.rmtree(tmp_path / "set" / "records")  # a finished set is not made again, whatever is left of its making
    os.unlink(tmp_path / "set" / "run.json")
    run_shard(config)
    card = written(manifest.uri)
    for name in card:
        os.unlink(join(manifest.uri, name))
    run_shard(config)
    assert written(manifest.uri) == card


def test_a_bounded_number_of_samples_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(encode_png(photo(40, 40)))
    crop = {"kind": "random", "size_px": 32, "num_per_image": 300}
    manifest = finished(shard_config(tmp_path / "photos", tmp_path / "set", degradation=None, crop=crop))
    read = []

    def counted(uri: str, entry: object) -> dict[str, bytes]:
        read.append(entry)
        return read_sample(uri, entry)  # type: ignore[arg-type]

    read_sample = card.read_sample
    monkeypatch.setattr(card, "read_sample", counted)
    write_card(manifest)
    assert len(read) == len(set(read)) == card.NUM_SAMPLES < manifest.num_samples
    sheet = decode_image(written(manifest.uri)["contact_sheet.jpg"], where="sheet")
    cell_height = card.SIDE_PX + card.LABEL_PX + card.GAP_PX
    assert sheet.shape == (6 * cell_height, 6 * (2 * card.SIDE_PX + 2 * card.GAP_PX), 3)
    assert {place.rsplit("/", 1)[1] for place in list_files(manifest.uri)} >= {"DATA_CARD.md", "contact_sheet.jpg"}


def test_the_sheet_shows_the_picture_and_its_middle(tmp_path: Path) -> None:
    """Left half red, right half blue, and a green middle."""
    picture = np.zeros((512, 768, 3), np.uint8)
    picture[:, :384, 0], picture[:, 384:, 2] = 255, 255
    picture[192:320, 320:448] = (0, 255, 0)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(encode_png(picture))
    manifest = finished(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    write_card(manifest)
    sheet = decode_image(written(manifest.uri)["contact_sheet.jpg"], where="sheet").astype(int)
    assert sheet.shape == (card.SIDE_PX + card.LABEL_PX + card.GAP_PX, 3 * card.SIDE_PX + 2 * card.GAP_PX, 3)
    middle = card.GAP_PX + card.SIDE_PX // 2
    colours = []
    for tile in range(3):
        for x in (10, 40, 64):  # at the edge, between, in the middle; the tiles of the middle are enlarged
            colours.append(int(sheet[middle, card.GAP_PX + tile * card.SIDE_PX + x].argmax()))
    assert colours == [0, 0, 1, 0, 1, 1, 0, 1, 1]


def test_samples_are_spread_evenly() -> None:
    assert evenly(range(3), 10) == [0, 1, 2]
    assert evenly(range(100), 4) == [12, 37, 62, 87]
    assert evenly(range(10**6), 2) == [250_000, 750_000]
    assert evenly([], 5) == []


def test_gradient_energy_is_of_neighbouring_pixels() -> None:
    checks = np.zeros((32, 32, 3), np.uint8)
    assert gradient_energy(grey_levels(checks)) == 0
    checks[::2, ::2] = checks[1::2, 1::2] = 10
    assert gradient_energy(grey_levels(checks)) == pytest.approx(200)  # 10 across and 10 down, everywhere
    ramp = np.repeat(np.arange(0, 96, 3, dtype=np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    assert gradient_energy(grey_levels(ramp)) == pytest.approx(9)
