"""The data card of a finished shard set: DATA_CARD.md says what is in it, contact_sheet.jpg shows it."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import yaml

from infra.display.bars import bars
from infra.display.templating import render
from infra.errors import printable
from infra.files.publish import put_if_absent
from infra.files.storage import join
from infra.imaging.images import decode_image
from infra.imaging.pixels import gradient_energy, grey_levels
from infra.run import read_run
from infra.shards.manifest import Manifest
from infra.shards.shard import Entry, image_of, read_sample
from pipelines.sharding.sources import CONTACT_SHEET

NUM_SAMPLES = 128
NUM_COLUMNS, NUM_CELLS = 6, 36
SIDE_PX, DETAIL_PX, LABEL_PX, GAP_PX = 128, 256, 16, 6
WHITE = (255, 255, 255)
TEMPLATE = Path(__file__).with_name("DATA_CARD.md.j2")
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Look:
    """A sample's HR size in px, mean brightness, gradient energy, and its cell of the contact sheet."""

    height: int
    width: int
    brightness: float
    energy: float
    cell: np.ndarray


def write_card(manifest: Manifest) -> None:
    """Write contact_sheet.jpg and DATA_CARD.md unless they are there.

    From the finished set alone, so that any run can; the pictures' part from 128 samples spread evenly. The text is the
    same each time and wherever the set is stored. Neither file is part of the dataset id.
    """
    with ThreadPoolExecutor(8) as pool:
        looks = list(pool.map(lambda entry: look_at(manifest.uri, entry), evenly(manifest.entries, NUM_SAMPLES)))
    put_if_absent(join(manifest.uri, CONTACT_SHEET), contact_sheet([look.cell for look in looks]))
    put_if_absent(
        join(manifest.uri, "DATA_CARD.md"), printable(card_text(manifest, read_run(manifest.uri), looks)).encode()
    )


def evenly(items: Sequence[ItemT], count: int) -> list[ItemT]:
    """At most `count` of the items at equal distances, from the middle of each stretch."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def look_at(uri: str, entry: Entry) -> Look:
    members = read_sample(uri, entry)
    hr = decode_image(image_of(members), where=f"{uri}: {entry.key}")
    lr_data = image_of(members, "lr")
    lr = decode_image(lr_data, where=f"{uri}: {entry.key}") if lr_data else None
    energy = gradient_energy(grey_levels(hr))
    return Look(hr.shape[0], hr.shape[1], float(hr.mean()), energy, _cell(entry.key, hr, lr))


def _cell(key: str, hr: np.ndarray, lr: np.ndarray | None) -> np.ndarray:
    """The whole picture in a square, then the middle of HR and of LR, over the key."""
    tiles = [_centre(hr, min(hr.shape[:2]))]
    for image in (hr, lr):
        if image is not None:
            tiles.append(_centre(image, min(DETAIL_PX * image.shape[0] // hr.shape[0], *image.shape[:2])))
    label = np.full((LABEL_PX, SIDE_PX * len(tiles), 3), 255, np.uint8)
    cv2.putText(label, key, (2, 11), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (60, 60, 60), 1, cv2.LINE_AA)
    tiles[1:] = [cv2.copyMakeBorder(t[:, 2:], 0, 0, 2, 0, cv2.BORDER_CONSTANT, value=WHITE) for t in tiles[1:]]
    cell = np.vstack([np.hstack(tiles), label])
    return cv2.copyMakeBorder(cell, GAP_PX, 0, GAP_PX, GAP_PX, cv2.BORDER_CONSTANT, value=WHITE)


def _centre(image: np.ndarray, side: int) -> np.ndarray:
    y, x = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    how = cv2.INTER_AREA if side > SIDE_PX else cv2.INTER_NEAREST
    return cv2.resize(image[y : y + side, x : x + side], (SIDE_PX, SIDE_PX), interpolation=how)


def contact_sheet(cells: Sequence[np.ndarray]) -> bytes:
    """A JPEG of up to 36 cells of equal size, uint8 RGB, row by row."""
    cells = evenly(cells, NUM_CELLS)
    blank = np.full_like(cells[0], 255)
    columns = min(NUM_COLUMNS, len(cells))
    rows = [list(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    sheet = np.vstack([np.hstack(row + [blank] * (columns - len(row))) for row in rows])
    return cv2.imencode(".jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()


def card_text(manifest: Manifest, run: dict[str, Any], looks: Sequence[Look]) -> str:
    """The Markdown of the card."""
    facts, config = manifest.facts, run["config"]
    degradation = config.get("degradation")
    if degradation is None:
        made = "none: LR images as found" if manifest.has_lr else "none: left to training"
    else:
        made = degradation if isinstance(degradation, str) else "a recipe, see below"
    failed, dropped, alike = manifest.quarantined, facts.get("dropped", {}), facts.get("near_duplicates")
    reasons = Counter(item["reason"] for item in failed).most_common()
    return render(
        TEMPLATE,
        dataset_id=manifest.dataset_id,
        summary=[
            ("samples", f"{manifest.num_samples:,} in {len(manifest.shard_facts):,} shards"),
            (
                "size",
                f"{facts['num_bytes'] / 2**20:,.1f} MiB, {facts['num_bytes'] / manifest.num_samples:,.0f} a sample",
            ),
            ("HR images", _sizes(looks)),
            ("crop", ", ".join(f"{name} {value}" for name, value in config["crop"].items())),
            ("scale", manifest.scale or "none"),
            ("degradation", made),
            ("set aside", f"{len(failed)} quarantined, {sum(dropped.values())} dropped"),
            *([("captions", f"{manifest.num_captions:,} samples")] if manifest.num_captions else []),
            *([("near-duplicates", f"{alike} files left out: near_duplicates.jsonl")] if alike is not None else []),
        ],
        sources=_sources(facts, config),
        set_aside=[
            *((reason, count, "quarantined") for reason, count in reasons),
            *((reason, count, "dropped") for reason, count in sorted(dropped.items())),
        ],
        quarantined=failed,
        num_looks=len(looks),
        histograms={
            "mean brightness (0 to 255)": bars([look.brightness for look in looks], np.arange(0, 257, 32)),
            "gradient energy (0: flat)": bars([look.energy for look in looks], 4.0 ** np.arange(-1, 8)),
        },
        shards=f"{{000000..{len(manifest.shard_facts) - 1:06d}}}",
        has_lr=manifest.has_lr,
        made_from=yaml.safe_dump({name: run[name] for name in ("config", "inputs", "libraries")}).rstrip(),
    )


def _sizes(looks: Sequence[Look]) -> str:
    sizes = sorted((look.height * look.width, look.width, look.height) for look in looks)
    shown = [f"{width} x {height}" for _, width, height in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
    return f"{shown[0]} px" if len(set(shown)) == 1 else f"{shown[0]} px to {shown[2]} px, the median {shown[1]} px"


def _sources(facts: dict[str, Any], config: dict[str, Any]) -> list[list[Any]]:
    names = ("name", "dataset", "num_files", "expected_files", "licence")
    return [
        [one.get(name) or {"dataset": one["kind"]}.get(name, "not stated") for name in names]
        for one in facts.get("sources", config["sources"])
    ]
