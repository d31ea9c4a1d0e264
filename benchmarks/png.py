"""Size, encoding and decoding time of PNG encoders on 512 px photographs, and their LRs', beside other lossless
formats; prints a Markdown table. QOI is in it where the package qoi is installed.

python benchmarks/png.py [--rounds 3]
"""

import argparse
import importlib.util
import io
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

# tests/ is not installed; its photographs serve here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from PIL import Image

from infra.imaging.images import decode_image, encode_png
from tests.golden.wheel_photos import PHOTOS, patch


def opencv(*flags: int) -> Callable[[np.ndarray], bytes]:
    return lambda image: cv2.imencode(".png", image[..., ::-1], flags)[1].tobytes()


def pillow(level: int) -> Callable[[np.ndarray], bytes]:
    def encode(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=level)
        return buffer.getvalue()

    return encode


def webp(method: int) -> Callable[[np.ndarray], bytes]:
    def encode(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=0, method=method)
        return buffer.getvalue()

    return encode


def decode(data: bytes) -> np.ndarray:
    return decode_image(data, where="benchmark")


def decode_by_opencv(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def measure(crops: list[np.ndarray], rounds: int) -> list[str]:
    """A row per encoder: mean KiB, CPU ms to encode and to decode; the encoders are timed in turn on each picture."""
    compression, strategy = cv2.IMWRITE_PNG_COMPRESSION, cv2.IMWRITE_PNG_STRATEGY
    names = {"filtered": cv2.IMWRITE_PNG_STRATEGY_FILTERED, "Huffman": cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY}
    names |= {"RLE": cv2.IMWRITE_PNG_STRATEGY_RLE, "zlib's": cv2.IMWRITE_PNG_STRATEGY_DEFAULT}
    encoders = {f"OpenCV, level {level}": opencv(compression, level) for level in (0, 1, 2, 3, 6, 9)}
    encoders |= {
        f"OpenCV, level {level}, strategy {name}": opencv(compression, level, strategy, value)
        for level in (1, 3)
        for name, value in names.items()
    }
    encoders |= {f"Pillow, level {level}": pillow(level) for level in (1, 3, 6)}
    encoders = {"`encode_png`, the default": encode_png, **encoders}
    codecs = {name: (encode, decode) for name, encode in encoders.items()}
    codecs["`encode_png`, decoded by OpenCV"] = encode_png, decode_by_opencv
    for method in (0, 4):
        codecs[f"WebP, lossless, method {method}"] = webp(method), decode
        codecs[f"WebP, lossless, method {method}, decoded by OpenCV"] = webp(method), decode_by_opencv
    if importlib.util.find_spec("qoi"):
        import qoi

        codecs["QOI"] = qoi.encode, qoi.decode
    sizes: dict[str, int] = defaultdict(int)
    encoding: dict[str, float] = defaultdict(float)
    decoding: dict[str, float] = defaultdict(float)
    for crop in crops * rounds:
        for name, (encode, read) in codecs.items():
            start = time.process_time()
            data = encode(crop)
            encoding[name] += time.process_time() - start
            start = time.process_time()
            pixels = read(data)
            decoding[name] += time.process_time() - start
            assert (pixels == crop).all()
            sizes[name] += len(data)
    rows = []
    for name in codecs:
        kib, encode_ms, decode_ms = (
            total[name] * unit / (len(crops) * rounds)
            for total, unit in ((sizes, 1 / 1024), (encoding, 1e3), (decoding, 1e3))
        )
        rows.append(f"| {name} | {kib:.1f} | {encode_ms:.2f} | {decode_ms:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    crops = [patch(name) for name in PHOTOS]
    small = [cv2.resize(crop, (128, 128), interpolation=cv2.INTER_AREA) for crop in crops]
    libraries = ("opencv-python-headless", "pillow", "numpy")
    print(f"* command: `python {' '.join(sys.argv)}`", f"* date: {date.today()}", sep="\n")
    print(f"* machine: {platform.machine()}, one thread;", ", ".join(f"{name} {version(name)}" for name in libraries))
    for size, pictures in ((512, crops), (128, small)):
        print(f"\n## {len(pictures)} photographs of {size} x {size} px\n")
        print("| encoder | KiB | encode, CPU ms | decode, CPU ms |", "|---|---|---|---|", sep="\n")
        print(*measure(pictures, options.rounds), sep="\n")


if __name__ == "__main__":
    main()
