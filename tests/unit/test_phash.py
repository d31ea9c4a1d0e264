"""Perceptual hashes: near for the same picture, far for others, silent about skies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from photos import photo

from infra import rng_for
from pipelines.sharding.files import SourceFile
from pipelines.sharding.screening.dedupe import near_duplicates
from pipelines.sharding.screening.phash import NEAR_BITS, near_pairs, perceptual_hash

skimage = pytest.importorskip("skimage", reason="the photographs come with the extra `demo`")
sklearn = pytest.importorskip("sklearn", reason="the photographs come with the extra `demo`")
PLACES = [Path(skimage.__path__[0], "data", name) for name in ("astronaut.png", "coffee.png", "chelsea.png")]
PLACES += [Path(sklearn.__path__[0], "datasets", "images", name) for name in ("china.jpg", "flower.jpg")]


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    return [np.ascontiguousarray(cv2.imread(str(place))[..., ::-1]) for place in PLACES]


def bits(a: np.ndarray, b: np.ndarray) -> int:
    return (perceptual_hash(a) ^ perceptual_hash(b)).bit_count()


def jpeg(image: np.ndarray) -> np.ndarray:
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 50])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


def half(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def cut(image: np.ndarray) -> np.ndarray:
    border = min(image.shape[:2]) // 100
    return np.ascontiguousarray(image[border:-border, border:-border])


@pytest.mark.parametrize("change", [jpeg, half, cut, lambda image: half(jpeg(image))])
def test_the_same_photograph_stays_near(photographs: list[np.ndarray], change: object) -> None:
    assert max(bits(image, change(image)) for image in photographs) <= NEAR_BITS  # type: ignore[operator]


def test_other_photographs_are_far(photographs: list[np.ndarray]) -> None:
    distances = [bits(a, b) for i, a in enumerate(photographs) for b in photographs[:i]]
    assert min(distances) > 3 * NEAR_BITS


def test_skies_have_no_hash() -> None:
    sky = np.full((256, 256, 3), (90, 140, 220), np.uint8)
    noisy = np.clip(sky + rng_for(0, "sky").normal(0, 4, sky.shape), 0, 255).astype(np.uint8)
    gradient = np.clip(noisy + np.linspace(0, 30, 256)[:, None, None], 0, 255).astype(np.uint8)
    assert [perceptual_hash(image) for image in (sky, noisy, gradient)] == [0, 0, 0]
    assert perceptual_hash(photo(64, 64)) != 0
    assert perceptual_hash(photo(64, 64)).bit_length() <= 64


def test_near_pairs_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = rng_for(1, "hashes")
    b = rng.integers(1, 2**64, 1500, dtype=np.uint64)
    flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (1000, 7), dtype=np.uint64), axis=1)
    a = b[rng.integers(0, len(b), 1000)] ^ flips
    a[::50], b[::50] = 0, 0  # pictures that are too flat are no pair, not even with one another
    expected = [
        (i, j, int(x ^ y).bit_count())
        for i, x in enumerate(a.tolist())
        for j, y in enumerate(b.tolist())
        if x and y and (x ^ y).bit_count() <= 6
    ]
    assert len(expected) > 100
    assert list(near_pairs(a, b)) == expected
    monkeypatch.setattr("pipelines.sharding.screening.phash.COMPARED_AT_ONCE", 100)
    assert list(near_pairs(a, b)) == expected
    assert [*near_pairs(a[:0], b), *near_pairs(a, b[:0])] == []
    assert len(list(near_pairs(a, b, max_bits=7))) > len(expected)
    few = a[:60], b[:60]
    assert len(list(near_pairs(*few, max_bits=64))) == np.count_nonzero(few[0]) * np.count_nonzero(few[1])


def test_the_first_of_those_alike_is_kept_and_what_is_left_out_leaves_nothing_out() -> None:
    hashes = np.array([0b111, 0, 0b1, 0, 0b11111, 2**63], np.uint64)
    files = [SourceFile(f"k{number}", "s", f"{number}.png", "", 0) for number in range(len(hashes))]
    lines = near_duplicates(files, hashes, 2)
    assert [(line["key"], line["like"], line["bits"]) for line in lines] == [("k2", "0.png", 2), ("k4", "0.png", 2)]
    chain = np.array([0b1, 0b111, 0b11111], np.uint64)  # the third is like the second alone, which is gone
    assert [line["key"] for line in near_duplicates(files[:3], chain, 2)] == ["k1"]


def test_many_frames_that_are_alike_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed camera's frames: once one is left out, its pairs are not listed."""
    rng = rng_for(2, "frames")
    hashes = np.uint64(2**63 - 1) ^ (np.uint64(1) << rng.integers(0, 64, 5000, dtype=np.uint64))
    files = [SourceFile(f"k{number}", "s", f"{number}.png", "", 0) for number in range(len(hashes))]
    listed = []

    def counted(*hashes: Any, **how: Any) -> Iterator[tuple[int, int, int]]:
        for pair in near_pairs(*hashes, **how):
            listed.append(pair)
            yield pair

    monkeypatch.setattr("pipelines.sharding.screening.phash.COMPARED_AT_ONCE", 2**18)
    monkeypatch.setattr("pipelines.sharding.screening.dedupe.near_pairs", counted)
    lines = near_duplicates(files, hashes, 4)
    assert [line["key"] for line in lines] == [file.key for file in files[1:]]
    assert {line["like"] for line in lines} == {"0.png"}
    assert len(listed) < 100_000, "of 12 million"
