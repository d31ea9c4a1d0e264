"""How far apart perceptual hashes are: changed copies of a photograph against other photographs; writes phash.md."""

import argparse
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np

from infra.config import library_versions
from infra.errors import DataError
from infra.imaging.images import decode_image, list_images
from pipelines.sharding.screening.phash import NEAR_BITS, near_pairs, perceptual_hash

PHOTOS = {"skimage": "data", "sklearn": "datasets/images"}
NAMES = ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "china.jpg", "flower.jpg"]
PATCH_PX, PATCHES_PER_PHOTO = 512, 12


def jpeg(quality: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(image: np.ndarray) -> np.ndarray:
        return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)

    return change


def resized(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def cut(share: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(image: np.ndarray) -> np.ndarray:
        y, x = (round(share * side) for side in image.shape[:2])
        return np.ascontiguousarray(image[y : image.shape[0] - y, x : image.shape[1] - x])

    return change


CHANGES = {
    "JPEG 90": jpeg(90),
    "JPEG 50": jpeg(50),
    "JPEG 20": jpeg(20),
    "half the size": resized(0.5),
    "a quarter of the size": resized(0.25),
    "1 % cut from each side": cut(0.01),
    "2 % cut from each side": cut(0.02),
    "5 % cut from each side": cut(0.05),
}


def load(folder: str | None) -> list[np.ndarray]:
    places = [path for package, sub in PHOTOS.items() for path in (Path(str(files(package))) / sub).iterdir()]
    places = [path for path in places if path.name in NAMES] + (
        [Path(uri) for uri in list_images(folder)] if folder else []
    )
    images = []
    for place in places:
        try:
            image = decode_image(place.read_bytes(), where=str(place))
            while min(image.shape[:2]) >= 4 * PATCH_PX:
                image = resized(0.5)(image)
            images.append(image)
        except DataError as error:
            print(error)
    return images


def patches(image: np.ndarray) -> list[np.ndarray]:
    size = min(PATCH_PX, *image.shape[:2])
    corners = [
        (y, x) for y in range(0, image.shape[0] - size + 1, size) for x in range(0, image.shape[1] - size + 1, size)
    ]
    step = -(-len(corners) // PATCHES_PER_PHOTO)
    return [np.ascontiguousarray(image[y : y + size, x : x + size]) for y, x in corners[::step]]


def rows(name: str, images: list[np.ndarray]) -> list[str]:
    """Bits that differ: a table of copies, and how many pairs of other pictures are near."""
    hashes = np.array([perceptual_hash(image) for image in images], np.uint64)
    known = [(image, int(code)) for image, code in zip(images, hashes, strict=True) if code]
    lines = [f"{name}: {len(images)}, of them {len(images) - len(known)} too flat for a hash.\n"]
    lines += ["| copy | median | 95 % | most |", "|---|---|---|---|"]
    for change, make in CHANGES.items():
        bits = [(perceptual_hash(make(image)) ^ code).bit_count() for image, code in known]
        lines.append(f"| {change} | {np.median(bits):.0f} | {np.percentile(bits, 95):.0f} | {max(bits)} |")
    pairs = sorted(bits for i, j, bits in near_pairs(hashes, hashes, max_bits=64))
    near = ", ".join(f"{sum(bits <= limit for bits in pairs)} within {limit}" for limit in (NEAR_BITS, 8, 10, 12))
    return [*lines, f"\nOf {len(pairs):,} pairs of others: {near} bits; the nearest {pairs[0]}.\n"]


def speed(num_train: int, num_test: int) -> str:
    rng = np.random.Generator(np.random.Philox(0))
    train, test = (rng.integers(1, 2**64, count, dtype=np.uint64) for count in (num_train, num_test))
    start = time.process_time()
    found = len(list(near_pairs(train, test)))
    seconds = time.process_time() - start
    return f"{num_train:,} x {num_test:,} random hashes: {seconds:.1f} s of one core, {found} near.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", help="a folder of further photographs")
    arguments = parser.parse_args()
    images = load(arguments.photos)
    text = [
        "# Perceptual hashes\n",
        f"{time.strftime('%Y-%m-%d')}, `python benchmarks/phash.py{' --photos FOLDER' if arguments.photos else ''}`, "
        + ", ".join(
            f"{name} {version}" for name, version in library_versions("numpy", "opencv-python-headless").items()
        )
        + f". Near: at most {NEAR_BITS} of 64 bits. The seven photographs of the scikit-image and scikit-learn wheels, "
        "then FOLDER (where one is given, 58 photographs of Debian's wallpaper packages).\n",
        *rows("Whole photographs", images),
        *rows(f"Patches of {PATCH_PX} px", [patch for image in images for patch in patches(image)]),
        speed(100_000, 10_000),
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
