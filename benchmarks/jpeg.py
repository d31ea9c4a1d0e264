"""Decoding less than a whole JPEG: at a fraction of its size, as `short_side_px` could, and a window of 512 px.

OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/jpeg.py PHOTO...
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from infra.imaging.images import decode_image

LONG_PX, SHORT_PX, WINDOW_PX, ROUNDS = 2048, 400, 512, 7


def main(paths: list[str]) -> None:
    cv2.setNumThreads(1)
    times: dict[str, list[float]] = {}
    differences: list[float] = []
    equal: list[bool] = []
    for path in paths:
        photo = Image.fromarray(decode_image(Path(path).read_bytes(), where=path))
        scale = LONG_PX / max(photo.size)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=95)
        data = file.getvalue()
        ways = {
            "whole, Pillow (`decode_image`)": lambda data=data: decode_image(data, where=""),
            "whole, OpenCV": lambda data=data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
            "whole, then Lanczos to a short side of 400 px": lambda data=data: shrunk(data, draft=False),
            "at half size (`draft`), then Lanczos to 400 px": lambda data=data: shrunk(data, draft=True),
            "at an eighth: little but the entropy decoding, which no window avoids": lambda data=data: eighth(data),
            "whole, then a window of 512 px": lambda data=data: decode_image(data, where="")[300:812, 700:1212],
        }
        for name, way in ways.items():
            times.setdefault(name, []).append(milliseconds(way))
        equal.append(np.array_equal(*(ways[name]() for name in list(ways)[:2])))
        one, other = (np.asarray(shrunk(data, draft=draft), np.float32) for draft in (False, True))
        differences.append(float(np.abs(one - other).mean()))
    print("| way | CPU ms |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {np.mean(values):.1f} |")
    print(f"\n`draft` moves a pixel by {np.mean(differences):.2f} levels in the mean.")
    print(f"Both decoders agree in every pixel of {sum(equal)} of {len(equal)}.")


def shrunk(data: bytes, *, draft: bool) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    ratio = SHORT_PX / min(image.size)
    size = round(image.width * ratio), round(image.height * ratio)
    if draft:
        image.draft("RGB", size)  # libjpeg-turbo's scaled decoding: 1/2, 1/4, 1/8, never under the size
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def eighth(data: bytes) -> None:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // 8, image.height // 8))
    image.load()


def milliseconds(way: Callable[[], object]) -> float:
    way()
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        way()
        found.append(time.process_time() - began)
    return 1000 * min(found)


if __name__ == "__main__":
    main(sys.argv[1:])
